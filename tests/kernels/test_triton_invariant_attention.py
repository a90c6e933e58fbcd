"""The batch-invariant attention: against fp32, and bit for bit the same however it is cut."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels.invariant_splits import (
    AttentionSplits,
    UnitRows,
    invariant_tile_tokens,
)
from openlora.kernels.triton_invariant_attention import invariant_attention
from tests.kernels.test_triton_attention import DEVICE, TOLERANCE, PagedCase, cases

SPLITS = AttentionSplits(64, 3, 128)
"""Smaller than an engine's, so that a test needs no long contexts."""


def attend(
    case: PagedCase,
    q: torch.Tensor,
    rows: list[tuple[int, int]],
    *,
    window: int = 0,
    cap: float = 0.0,
) -> torch.Tensor:
    """Attention of (sequence, tokens) in turn, the last positions of each; q in this order."""
    heads = (case.num_heads, case.num_kv_heads, case.head_dim)
    unit_rows = UnitRows(1, *heads, 400, 1, DEVICE, SPLITS)
    spans, tiles, first = [], [], 0
    for row, (_, count) in enumerate(rows):
        spans.append((first, count, 0))
        tiles += [(row, at) for at in range(0, count, invariant_tile_tokens(*heads[:2]))]
        first += count
    out = torch.full((first, heads[0] * heads[2]), float("nan")).to(DEVICE, case.dtype)
    invariant_attention(
        q,
        case.cache,
        case.tables[[sequence for sequence, _ in rows]],
        ints([case.lens[sequence] for sequence, _ in rows]),
        ints(spans),
        ints(tiles),
        heads[2] ** -0.5,
        unit_rows,
        out,
        window=window,
        soft_cap=cap,
    )
    return out


def decode(
    case: PagedCase,
    q: torch.Tensor,
    lens: list[int],
    parts: int,
    *,
    window: int,
    cap: float,
    times: int = 1,
) -> torch.Tensor:
    """Attention of one token each over the first ``lens`` positions of the sequences in turn."""
    heads = (case.num_heads, case.num_kv_heads, case.head_dim)
    unit_rows = UnitRows(len(lens), *heads, 400, parts, DEVICE, SPLITS)
    out = torch.full((len(lens), heads[0] * heads[2]), float("nan")).to(DEVICE, case.dtype)
    for _ in range(times):
        invariant_attention(
            q,
            case.cache,
            case.tables,
            ints(lens),
            None,
            None,
            heads[2] ** -0.5,
            unit_rows,
            out,
            window=window,
            soft_cap=cap,
        )
        assert not unit_rows.arrived.any()
    return out


def ints(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("heads", "dtype", "window", "cap"),
    cases([(4, 2, 16), (9, 3, 24), (8, 1, 32)], [(0, 0.0), (40, 2.0), (200, 0.0)]),
)
def test_a_decode_is_right_and_the_same_in_any_number_of_parts(heads, dtype, window, cap) -> None:
    lens = [1, 16, 63, 65, 128, 300]
    case = PagedCase(lens, heads, dtype)
    q = case.queries(len(lens))
    whole = decode(case, q, lens, 1, window=window, cap=cap)
    for row, length in enumerate(lens):
        expected = case.expected(row, q[row : row + 1], length - 1, window, cap)
        torch.testing.assert_close(
            whole[row : row + 1].float().cpu(),
            expected,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
        )
    for parts in (2, 4):
        again = decode(case, q, lens, parts, window=window, cap=cap, times=2)
        assert torch.equal(again, whole)


def test_padding_is_left_unwritten() -> None:
    case = PagedCase([20, 0, 7], (4, 2, 16), torch.float32)
    q = case.queries(3)
    out = decode(case, q, [20, 0, 7], 3, window=0, cap=0.0)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.long
@pytest.mark.parametrize(
    ("heads", "dtype", "window", "cap"),
    cases([(4, 2, 16), (9, 3, 24)], [(0, 0.0), (20, 2.0), (150, 0.0)]),
)
def test_chunks_give_what_the_whole_prompt_and_decodes_give(heads, dtype, window, cap) -> None:
    length = 290
    case = PagedCase([length, 33], heads, dtype)
    q = case.queries(length)
    whole = attend(case, q, [(0, length)], window=window, cap=cap)
    expected = case.expected(0, q, 0, window, cap)
    torch.testing.assert_close(
        whole.float().cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    at = 0
    for count in (1, 63, 65, 2, 159):
        # As far as the chunk the context reaches; behind it the cache is not looked at.
        case.lens[0] = at + count
        beside = torch.cat((q[:5], q[at : at + count]))
        chunk = attend(case, beside, [(1, 5), (0, count)], window=window, cap=cap)[5:]
        assert torch.equal(chunk, whole[at : at + count])
        at += count
    assert at == length
    for position, parts in ((0, 3), (64, 1), (191, 3), (192, 1), (289, 3)):
        lens = [position + 1, 33]
        alone = decode(case, q[[position, 0]], lens, parts, window=window, cap=cap)
        assert torch.equal(alone[0], whole[position])


@pytest.mark.parametrize(
    ("context_len", "count"), [(1, 1), (256, 1), (257, 2), (8192, 32), (8193, 33), (131072, 62)]
)
def test_splits_of_long_contexts_stay_few(context_len: int, count: int) -> None:
    assert AttentionSplits().count(context_len) == count
