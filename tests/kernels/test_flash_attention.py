"""The adapters of the flash-attn libraries: what they pass on, computed by torch in their place."""

from __future__ import annotations

import itertools

import pytest
import torch

from openlora.kernels.flash_attention import (
    Chunks,
    FlashAttention2,
    FlashAttention4,
    paged_views,
)
from tests.engine.flash_libraries import flash2, flash4
from tests.kernels.test_triton_attention import PagedCase

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins compute on CPU")

ADAPTERS = [FlashAttention4(flash4), FlashAttention2(flash2)]
HEADS = (6, 2, 8)
SHAPES = list(itertools.product((0, 5), (0.0, 3.0)))


@pytest.mark.parametrize(("window", "cap"), SHAPES)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_decode_of_ragged_rows(adapter, window, cap):
    lens = [1, 15, 0, 16, 17, 40]
    case = PagedCase(lens, HEADS, torch.float32)
    q = case.queries(len(lens))
    context_lens = torch.tensor(lens, dtype=torch.int32)
    out = adapter.decode(
        q, case.cache, case.tables, context_lens, 8**-0.5, window=window, soft_cap=cap
    )
    assert out.shape == q.shape
    for row, length in enumerate(lens):
        if length:
            expected = case.expected(row, q[row : row + 1], length - 1, window, cap)
            torch.testing.assert_close(out[row].flatten(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "cap"), SHAPES)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_chunks_behind_cached_positions_and_decodes(adapter, window, cap):
    counts, starts = [2, 16, 33], [0, 7, 31]
    decodes = 3  # tokens of other rows, in front
    lens = [count + start for count, start in zip(counts, starts, strict=True)]
    case = PagedCase(lens, HEADS, torch.float32)
    q = case.queries(decodes + sum(counts))
    ends = list(itertools.accumulate(counts, initial=decodes))
    chunks = Chunks(
        torch.tensor(ends, dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        # Only the differences count.
        torch.tensor(list(itertools.accumulate(lens, initial=9)), dtype=torch.int32),
        case.tables,
        max(counts),
    )
    out = adapter.prefill(q, case.cache, chunks, 8**-0.5, window=window, soft_cap=cap)
    assert out.shape == q.shape
    for row, start in enumerate(starts):
        part = slice(ends[row], ends[row + 1])
        expected = case.expected(row, q[part], start, window, cap)
        torch.testing.assert_close(out[part].flatten(1), expected, rtol=1e-5, atol=1e-5)


def test_the_cache_is_seen_without_a_copy():
    cache = torch.randn(2, 5, 3, 16, 8)
    for view, half in zip(paged_views(cache), cache, strict=True):
        assert view.shape == (5, 16, 3, 8)
        assert view.data_ptr() == half.data_ptr()
        assert torch.equal(view[4, 7, 2], half[4, 2, 7])
