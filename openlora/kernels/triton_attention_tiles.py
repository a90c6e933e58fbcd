# ruff: noqa: ANN001, ANN201 - Triton kernels take pointers and compile-time constants.
"""What the attention kernels do with a tile of positions: read it, score it, add it up."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def scaled_scores(scores, scale_log2, SOFT_CAP: tl.constexpr):
    """scores · scale, soft-capped where ``SOFT_CAP`` is not 0, in units of log 2.

    ``scale_log2``: scale · log2(e), or 2 · scale / cap · log2(e) with a cap.
    """
    if SOFT_CAP != 0.0:
        # cap · tanh(x) = cap · (1 − 2 / (1 + exp(2x)))
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * scale_log2))
        scores = scores * (SOFT_CAP * 1.4426950408889634)
    else:
        scores = scores * scale_log2
    return scores


def score_factor(scale: float, soft_cap: float) -> float:
    """``scale_log2`` of ``scaled_scores``."""
    return (2 * scale / soft_cap if soft_cap else scale) * LOG2_E


@triton.jit
def load_positions(
    cache_ptr,
    table_ptr,
    n,
    end,
    dims,
    kv_head,
    v_offset,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """K and V of positions ``n`` of one KV head, [positions, dims]; 0 from ``end`` on.

    ``table_ptr``: the sequence's block table. What lies behind its end is not read, nor what a
    block holds there: it may be another sequence's, and not finite.
    """
    block = tl.load(table_ptr + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
    kv_row = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + n % BLOCK_SIZE
    at = cache_ptr + kv_row[:, None] * HEAD_DIM + dims[None, :]
    mask = (n < end)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + v_offset, mask=mask, other=0.0)


@triton.jit
def absorb(scores, v, new_top, top, total, acc):
    """One tile of an online softmax: the new (total, acc) of ``scores`` [queries, positions] and v.

    ``top``: the largest score so far; ``new_top``: that of the scores included.
    """
    weights = tl.exp2(scores - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(weights, axis=1)
    acc = acc * rescale[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return total, acc
