"""The Triton SGMV against an fp32 loop, over ragged segments, ranks, ensembles and odd sizes."""

from __future__ import annotations

import pytest
import torch

from openlora.adapters.lora_set import PAGE_RANK, SITES, LoRASet
from openlora.engine.sgmv_plan import PlanLayout, SGMVPlan, build_plan
from openlora.kernels import triton_sgmv
from openlora.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from openlora.kernels.triton_sgmv import SGMVTables, SGMVTiles, sgmv_shrink
from openlora.kernels.triton_sgmv_expand import sgmv_expand
from openlora.kernels.triton_sgmv_gated import sgmv_expand_gated

# exp(-x) of a large -x is inf, and 1 / (1 + inf) the 0 that it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning:triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter knows no bfloat16 arithmetic.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, HALF: 2e-2}

# (slices, blocks, K, block_out): the four kinds of site, small and odd.
SITE_SHAPES = {
    "qkv": (3, 4, 72, 24),
    "o": (1, 1, 48, 72),
    "gate_up": (2, 2, 72, 200),
    "down": (1, 1, 200, 72),
}


def lora_set(pages: list[tuple[int, float]], site: int) -> LoRASet:
    """A set with ``pages`` at one site only."""
    return LoRASet(tuple(tuple(pages) if s == site else () for s in range(len(SITES))), str(pages))


def on_device(plan: SGMVPlan, layout: PlanLayout, usual: tuple[int, int] | None) -> SGMVTables:
    """The tables of ``plan``; records that it does not use name pages and rows out of range."""
    packed = torch.full((len(SITES), layout.site_ints), 1 << 30, dtype=torch.int32)
    layout.fill(plan, packed.numpy())
    most = (layout.max_chunks, layout.max_items)
    return SGMVTables(packed.to(DEVICE), layout.items_at, *most, *(usual or most))


def run_case(
    site_name: str,
    segments: list[tuple[int, list[tuple[int, float]]]],
    dtype: torch.dtype,
    tiles: SGMVTiles,
    num_pages: int = 9,
    spare: int = 0,
    usual: tuple[int, int] | None = None,
) -> None:
    """Compare one batch of (rows, pages) segments with the loop reference; check other bits."""
    slices, blocks, k, block_out = SITE_SHAPES[site_name]
    site = SITES.index(site_name)
    generator = torch.Generator().manual_seed(len(segments))
    rows = sum(count for count, _ in segments)
    # Layer 1 of 2, as the pool has it: the page stride spans two layers.
    a = torch.randn(num_pages, 2, k, slices * 16, generator=generator).to(DEVICE, dtype)
    b = torch.randn(num_pages, 2, blocks, 16, block_out, generator=generator).to(DEVICE, dtype)
    x = torch.randn(rows, k, generator=generator).to(DEVICE, dtype)
    base = torch.randn(rows, blocks * block_out, generator=generator).to(DEVICE, dtype)
    plan = build_plan(
        [lora_set(pages, site) for _, pages in segments],
        [count for count, _ in segments],
        chunk_rows=tiles.chunk_rows,
    )
    h = torch.full((tiles.splits, max(plan.h_rows, 1), slices * 16), float("nan"), device=DEVICE)
    packed = on_device(plan, PlanLayout(plan.num_chunks + spare, plan.num_items + spare), usual)
    y = base.clone()
    sgmv_shrink(x, a[:, 1], packed, h, site=site, tiles=tiles)
    sgmv_expand(h, b[:, 1], packed, y, site=site, tiles=tiles)

    expected = base.float().clone()
    row = 0
    for count, pages in segments:
        for page, weight in pages:
            shrunk = x[row : row + count].float() @ a[page, 1].float()
            for block in range(blocks):
                part = max(block - (blocks - slices), 0)
                delta = shrunk[:, part * 16 : part * 16 + 16] @ b[page, 1, block].float()
                expected[row : row + count, block * block_out : (block + 1) * block_out] += (
                    weight * delta
                )
        if not pages:
            assert torch.equal(y[row : row + count], base[row : row + count])
        row += count
    assert not y.isnan().any()
    if site_name == "gate_up":
        for activation, reference in (("silu", silu_and_mul), ("gelu_tanh", gelu_tanh_and_mul)):
            out = sgmv_expand_gated(
                h, b[:, 1], packed, base, site=site, tiles=tiles, activation=activation
            )
            # Rounded alike, but for an ulp between the ways to compute an exponential.
            torch.testing.assert_close(out, reference(y), rtol=TOLERANCE[dtype], atol=1e-5)
    error = (y.float() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < TOLERANCE[dtype], f"relative error {error}"


DECODE = SGMVTiles(chunk_rows=16, splits=4, shared_splits=2, block_k=32, block_n=32, num_programs=7)
PREFILL = SGMVTiles(
    chunk_rows=64, splits=1, shared_splits=1, block_k=32, block_n=64, num_programs=3
)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_mixed_ranks_ensembles_and_base_rows(site: str, dtype: torch.dtype) -> None:
    segments = [
        (1, [(3, 1.0)]),
        (2, []),
        (5, [(0, 1.0), (1, 1.0)]),
        (1, [(2, 0.6), (4, 0.4), (5, 0.4)]),
        (1, [(6, -1.5), (7, 1.0), (8, 1.0), (1, 1.0)]),
        (1, []),
    ]
    run_case(site, segments, dtype, DECODE)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("tiles", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_rows_around_the_chunk_size(count: int, tiles: SGMVTiles) -> None:
    run_case("o", [(count, [(1, 1.0)]), (2, [(0, 1.0)])], torch.float32, tiles)


@pytest.mark.parametrize("tiles", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_every_row_its_own_set(tiles: SGMVTiles) -> None:
    run_case("gate_up", [(1, [(i % 9, 1.0)]) for i in range(11)], torch.float32, tiles)


@pytest.mark.parametrize("rows", [0, 3])
def test_without_pages_nothing_is_touched(rows: int) -> None:
    run_case("qkv", [(rows, [])], torch.float32, DECODE)


def test_one_plan_serves_all_sites_with_their_own_counts() -> None:
    sets = [LoRASet((((1, 1.0), (2, 1.0)), (), ((0, 0.5),), ()), "a"), LoRASet.EMPTY]
    plan = build_plan([sets[0], sets[0], sets[1]], [2, 18, 4], chunk_rows=16)
    assert [len(items) for items in plan.items] == [4, 0, 2, 0]
    # Gate and up have chunks for all rows: the kernel behind them is also their activation.
    assert [len(chunks) for chunks in plan.chunks] == [2, 0, 3, 0]
    assert plan.chunks[2][2, :4].tolist() == [20, 4, 2, 2]
    assert plan.h_rows == 40
    assert plan.items[0][:, :4].tolist() == [
        [1, 0, 16, 0],
        [2, 0, 16, 16],
        [1, 16, 4, 32],
        [2, 16, 4, 36],
    ]
    assert plan.chunks[2][:2, :6].tolist() == [[0, 16, 0, 1, 0, 0], [16, 4, 1, 2, 0, 16]]
    assert plan.items[2][:, 4].view("float32").tolist() == [0.5, 0.5]


@pytest.mark.parametrize("tiles", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_unused_records_are_never_followed(tiles: SGMVTiles) -> None:
    run_case("down", [(1, [(8, 1.0), (0, 2.0)]), (20, [(3, 1.0)])], torch.float32, tiles, spare=31)


def test_more_records_than_a_launch_has_programs_for() -> None:
    segments = [(1, [(i % 9, 1.0), (3, 0.5)]) for i in range(5)]
    run_case("o", segments, torch.float32, DECODE, usual=(1, 1))


def test_pages_have_the_rank_that_the_pool_gives_them() -> None:
    assert triton_sgmv.PAGE_RANK == PAGE_RANK


def test_an_empty_plan_says_so() -> None:
    assert build_plan([], [], chunk_rows=16).is_empty
    assert build_plan([LoRASet.EMPTY], [3], chunk_rows=16).is_empty


INVARIANT = SGMVTiles(
    chunk_rows=16,
    splits=4,
    shared_splits=4,
    block_k=32,
    block_n=32,
    num_programs=7,
    fuses_gate=False,
    single_rows=False,
)


@pytest.mark.parametrize("site", SITES)
def test_one_path_for_one_row_and_for_many(site: str) -> None:
    segments = [(1, [(3, 1.0)]), (2, []), (21, [(0, 1.0), (1, -0.5)]), (1, [(2, 0.6), (4, 0.4)])]
    run_case(site, segments, HALF, INVARIANT)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rows_are_the_same_alone_and_in_any_chunk(dtype: torch.dtype) -> None:
    site, (slices, blocks, k, block_out) = 0, SITE_SHAPES["qkv"]
    generator = torch.Generator().manual_seed(8)
    a = torch.randn(4, k, slices * 16, generator=generator).to(DEVICE, dtype)
    b = torch.randn(4, blocks, 16, block_out, generator=generator).to(DEVICE, dtype)
    x = torch.randn(70, k, generator=generator).to(DEVICE, dtype)
    base = torch.randn(70, blocks * block_out, generator=generator).to(DEVICE, dtype)
    own = lora_set([(1, 0.5), (3, 1.0)], site)

    def run(first: int, sets: list[LoRASet], counts: list[int]) -> torch.Tensor:
        plan = build_plan(sets, counts, chunk_rows=INVARIANT.chunk_rows)
        h = torch.full((INVARIANT.splits, plan.h_rows, slices * 16), float("nan"), device=DEVICE)
        tables = on_device(plan, PlanLayout(plan.num_chunks, plan.num_items), None)
        rows = slice(first, first + sum(counts))
        y = base[rows].clone()
        sgmv_shrink(x[rows], a, tables, h, site=site, tiles=INVARIANT)
        sgmv_expand(h, b, tables, y, site=site, tiles=INVARIANT)
        return y

    whole = run(0, [own], [70])
    for first, count in ((0, 1), (69, 1), (5, 2), (3, 17), (0, 64), (5, 65)):
        assert torch.equal(run(first, [own], [count]), whole[first : first + count])
    other = lora_set([(0, 1.0)], site)
    beside = run(10, [other, own, LoRASet.EMPTY, own], [3, 1, 2, 20])
    assert torch.equal(beside[3:4], whole[13:14])
    assert torch.equal(beside[6:], whole[16:36])
