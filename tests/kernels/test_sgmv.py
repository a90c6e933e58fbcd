"""SGMV against a loop over rows and pages, on ragged segments, ranks, ensembles and sites."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels import sgmv as sgmv_module
from openlora.kernels.sgmv import Segment, plan_lora, sgmv

RANK = 16
SITES = {
    # name: in_features, slices, block_slices, block_out
    "qkv": (24, 3, (0, 0, 0, 1, 2), 8),
    "o": (24, 1, (0,), 40),
    "gate_up": (40, 2, (0, 1), 24),
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def make_pages(site, num_pages, dtype=torch.float32, layers=3, seed=0):
    """A and B of the middle one of several layers: a strided view, as the runner passes it."""
    in_features, slices, block_slices, block_out = SITES[site]
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_pages, layers, in_features, slices * RANK, generator=generator)
    b = torch.randn(num_pages, layers, len(block_slices), RANK, block_out, generator=generator)
    return (a * 0.2).to(dtype)[:, 1], (b * 0.2).to(dtype)[:, 1]


def expected(y, x, a, b, segments, block_slices):
    """y + Σ w · (x Aᵖ) Bᵖ, row by row in fp32."""
    y = y.float().clone()
    block_out = b.shape[3]
    for segment in segments:
        for row in range(segment.start, segment.end):
            for page, weight in segment.pages:
                shrunk = x[row].float() @ a[page].float()
                for block, source in enumerate(block_slices):
                    part = shrunk[source * RANK : (source + 1) * RANK] @ b[page, block].float()
                    y[row, block * block_out : (block + 1) * block_out] += weight * part
    return y


def check(site, lens, pages_of, dtype=torch.float32, num_pages=6):
    """Run segments of ``lens`` rows with ``pages_of`` each (() is a gap of base rows)."""
    a, b = make_pages(site, num_pages, dtype)
    block_slices = SITES[site][2]
    segments, start = [], 0
    for length, pages in zip(lens, pages_of, strict=True):
        if pages and length:
            segments.append(Segment(start, start + length, pages))
        start += length
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(start, a.shape[1], generator=generator).to(dtype)
    y = torch.randn(start, b.shape[1] * b.shape[3], generator=generator).to(dtype)
    want = expected(y, x, a, b, segments, block_slices)
    plan = plan_lora(segments, a, b, block_slices)
    if plan is None:
        assert not segments
        return
    sgmv(y, x, a, b, plan)
    torch.testing.assert_close(y.float(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65])
def test_one_segment_of_any_length(site, rows):
    check(site, [rows], [((2, 1.0),)])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mixed_lengths_with_base_rows_between(site, dtype):
    lens = [1, 1, 3, 2, 20, 1, 9, 4]
    pages = [((0, 1.0),), ((3, 1.0),), (), ((5, 1.0),), ((1, 1.0),), (), ((2, 1.0),), ((0, 1.0),)]
    check(site, lens, pages, dtype)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rows", [1, 12])
def test_ranks_up_to_128_are_several_pages(site, rows):
    wide = tuple((page, 1.0) for page in (7, 0, 3, 5, 1, 2, 4, 6))
    check(site, [rows, rows, rows], [wide, ((1, 1.0),), wide[:3]], num_pages=8)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rows", [1, 12])
def test_ensembles_are_the_weighted_sum(site, rows):
    check(site, [rows, rows], [((0, 0.6), (4, 0.4)), ((4, -1.5),)])


@pytest.mark.parametrize("popularity", ["identical", "distinct", "uniform", "skewed"])
def test_adapter_popularity(popularity):
    generator = torch.Generator().manual_seed(3)
    draws = {
        "identical": torch.zeros(16, dtype=torch.int64),
        "distinct": torch.randperm(16, generator=generator),
        "uniform": torch.randint(0, 16, (16,), generator=generator),
        "skewed": (16 * torch.rand(16, generator=generator) ** 4).long(),
    }[popularity]
    ids = sorted(draws.tolist())
    lens = [ids.count(page) for page in sorted(set(ids))]
    check("qkv", lens, [((page, 1.0),) for page in sorted(set(ids))], num_pages=16)


def test_rows_outside_segments_are_left_alone_and_no_segments_is_no_plan():
    a, b = make_pages("o", 2)
    assert plan_lora([], a, b, (0,)) is None
    x = torch.randn(6, a.shape[1])
    y = torch.randn(6, b.shape[3])
    before = y.clone()
    sgmv(y, x, a, b, plan_lora([Segment(2, 4, ((1, 1.0),))], a, b, (0,)))
    assert torch.equal(y[:2], before[:2])
    assert torch.equal(y[4:], before[4:])
    assert not torch.equal(y[2:4], before[2:4])


def test_bags_and_products_agree(monkeypatch):
    a, b = make_pages("qkv", 4)
    segments = [Segment(0, 5, ((0, 1.0), (3, 0.5))), Segment(5, 6, ((2, 1.0),))]
    x = torch.randn(6, a.shape[1])
    results = []
    for limit in (0, 100):
        monkeypatch.setattr(sgmv_module, "BAG_ROWS", limit)
        y = torch.zeros(6, 40)
        sgmv(y, x, a, b, plan_lora(segments, a, b, SITES["qkv"][2]))
        results.append(y)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_page_that_no_segment_names_may_hold_anything():
    a, b = make_pages("qkv", 3)
    a[1], b[1] = float("nan"), float("nan")
    segments = [Segment(0, 1, ((0, 1.0),)), Segment(1, 12, ((2, 1.0),))]
    y = torch.zeros(12, 40)
    sgmv(y, torch.randn(12, a.shape[1]), a, b, plan_lora(segments, a, b, SITES["qkv"][2]))
    assert y.isfinite().all()
