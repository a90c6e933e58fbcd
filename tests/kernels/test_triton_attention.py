"""The Triton attention kernels against an fp32 softmax, over contexts around block and split."""

from __future__ import annotations

import itertools

import pytest
import torch

from openlora.kernels.triton_attention import (
    DecodeScratch,
    decode_attention,
    decode_splits,
)
from openlora.kernels.triton_prefill_attention import prefill_attention, prefill_tile_tokens

# A split without positions divides 0 by 0, and the merge takes nothing of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter knows no bfloat16 arithmetic.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, HALF: 2e-2}
BLOCK_SIZE = 16


class PagedCase:
    """Random KV of some sequences in shuffled blocks; the blocks nobody owns hold NaN."""

    def __init__(
        self,
        lens: list[int],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lens))
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        blocks = [-(-length // block_size) for length in lens]
        num_blocks = sum(blocks) + 2
        ids = iter(torch.randperm(num_blocks, generator=generator).tolist())
        shape = (2, num_blocks, self.num_kv_heads, block_size, self.head_dim)
        cache = torch.full(shape, float("nan"))
        tables = torch.full((len(lens), max([*blocks, 1])), num_blocks + 99, dtype=torch.int32)
        self.kv = []
        for row, length in enumerate(lens):
            kv = torch.randn(2, self.num_kv_heads, length, self.head_dim, generator=generator)
            kv = kv.to(dtype)
            self.kv.append(kv.float())
            for index in range(blocks[row]):
                tables[row, index] = block = next(ids)
                part = kv[:, :, index * block_size : (index + 1) * block_size]
                cache[:, block, :, : part.shape[2]] = part.float()
        self.cache = cache.to(DEVICE, dtype)
        self.tables = tables.to(DEVICE)
        self.lens = lens
        self.generator = generator
        self.dtype = dtype

    def queries(self, tokens: int) -> torch.Tensor:
        """Random q as a slice of fused qkv rows, as the decoder has it."""
        width = self.num_heads + 2 * self.num_kv_heads
        qkv = torch.randn(tokens, width, self.head_dim, generator=self.generator)
        return qkv.to(DEVICE, self.dtype)[:, : self.num_heads]

    def expected(
        self, row: int, q: torch.Tensor, first_position: int, window: int = 0, cap: float = 0.0
    ) -> torch.Tensor:
        """fp32 attention of q's tokens at first_position, first_position + 1, …"""
        k, v = self.kv[row].repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        scores = torch.einsum("thd,hnd->htn", q.float().cpu(), k) / self.head_dim**0.5
        if cap:
            scores = cap * (scores / cap).tanh()
        position = torch.arange(q.shape[0])[:, None] + first_position
        key = torch.arange(k.shape[1])[None]
        hidden = key > position
        if window:
            hidden |= key <= position - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("htn,hnd->thd", weights, v).reshape(q.shape[0], -1)


def on_cpu(heads: tuple[int, int, int], dtype: torch.dtype, window: int, cap: float) -> bool:
    """Whether the slow interpreter runs a case: each value, but not each combination."""
    if dtype is HALF:
        return heads == (9, 3, 24) and cap > 0
    return not window or heads == (9, 3, 24)


def cases(
    heads: list[tuple[int, int, int]], windows: list[tuple[int, float]]
) -> list[tuple[tuple[int, int, int], torch.dtype, int, float]]:
    """All combinations on a GPU, those of ``on_cpu`` elsewhere."""
    every = itertools.product(heads, [torch.float32, HALF], windows)
    made = [(shape, dtype, *window) for shape, dtype, window in every]
    return [case for case in made if DEVICE.type == "cuda" or on_cpu(*case)]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("heads", "dtype", "window", "cap"),
    cases([(4, 2, 16), (9, 3, 24), (8, 1, 32)], [(0, 0.0), (40, 2.0), (200, 0.0)]),
)
def test_decode(
    heads: tuple[int, int, int], splits: int, dtype: torch.dtype, window: int, cap: float
) -> None:
    lens = [1, 15, 16, 17, 63, 64, 65, 129, 300]
    case = PagedCase(lens, heads, dtype)
    q = case.queries(len(lens) + 1)
    scratch = DecodeScratch(len(lens) + 1, *heads[:2], heads[2], splits, DEVICE)
    context_lens = torch.tensor([*lens, 0], dtype=torch.int32, device=DEVICE)
    tables = torch.cat([case.tables, case.tables[:1]])
    for _ in range(2):
        out = torch.full((len(lens) + 1, heads[0] * heads[2]), float("nan")).to(DEVICE, dtype)
        decode_attention(
            q,
            case.cache,
            tables,
            context_lens,
            heads[2] ** -0.5,
            scratch,
            out,
            window=window,
            soft_cap=cap,
        )
        assert not scratch.arrived.any()
    for row, length in enumerate(lens):
        expected = case.expected(row, q[row : row + 1], length - 1, window, cap)
        torch.testing.assert_close(
            out[row : row + 1].float().cpu(),
            expected,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
        )


@pytest.mark.parametrize(
    ("heads", "dtype", "window", "cap"),
    cases([(4, 2, 16), (9, 3, 24)], [(0, 0.0), (20, 2.0), (70, 0.0)]),
)
def test_prefill_of_chunks_behind_cached_positions(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int, cap: float
) -> None:
    starts = [0, 0, 30, 16, 99, 0, 3]
    counts = [1, 15, 17, 65, 1, 64, 63]
    lens = [start + count for start, count in zip(starts, counts, strict=True)]
    case = PagedCase(lens, heads, dtype)
    q = case.queries(sum(counts))
    rows, tiles, first = [], [], 0
    for row, count in enumerate(counts):
        rows.append((first, count, starts[row]))
        tiles += [(row, at) for at in range(0, count, prefill_tile_tokens(*heads[:2]))]
        first += count
    out = torch.full((sum(counts), heads[0] * heads[2]), float("nan")).to(DEVICE, dtype)
    prefill_attention(
        q,
        case.cache,
        case.tables,
        torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        torch.tensor(tiles, dtype=torch.int32, device=DEVICE),
        heads[2] ** -0.5,
        out,
        window=window,
        soft_cap=cap,
    )
    for row, (begin, count, start) in enumerate(rows):
        expected = case.expected(row, q[begin : begin + count], start, window, cap)
        torch.testing.assert_close(
            out[begin : begin + count].float().cpu(),
            expected,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
        )


@pytest.mark.parametrize("rows", [0, 1, 64, 256])
def test_splits_fill_the_processors_and_stay_few(rows: int) -> None:
    splits = decode_splits(rows, 8, 132, 131072)
    assert 1 <= splits <= 32
    assert splits == 1 or rows * 8 * splits <= 3 * 132 + 8 * rows
