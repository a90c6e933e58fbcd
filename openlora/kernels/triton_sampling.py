# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""Tokens in Triton: the greedy choice in one launch, and the choice of what a step runs on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openlora.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch_options,
    overlaps_launches,
)

_BLOCK = 4096
_MAX_PARTS = 32


@triton.jit
def _greedy_kernel(
    logits_ptr,
    out_ptr,
    best_ptr,
    best_at_ptr,
    arrived_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    PART: tl.constexpr = ((VOCAB + PARTS * BLOCK - 1) // (PARTS * BLOCK)) * BLOCK
    row = tl.program_id(0)
    part = tl.program_id(1)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    columns = part * PART + tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    best_at = columns
    for offset in range(0, PART, BLOCK):
        at = columns + offset
        value = tl.load(row_ptr + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
        # Infinity beats every finite logit and fails the row, which is what a NaN must do.
        value = tl.where(value != value, float("inf"), value)
        best_at = tl.where(value > best, at, best_at)
        best = tl.maximum(best, value)
    top = tl.max(best, axis=0)
    top_at = tl.min(tl.where(best == top, best_at, VOCAB), axis=0)
    tl.store(best_ptr + row * PARTS + part, top)
    tl.store(best_at_ptr + row * PARTS + part, top_at)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu")
    if arrived == PARTS - 1:
        tl.debug_barrier()
        parts = row * PARTS + tl.arange(0, PARTS)
        tops = tl.load(best_ptr + parts, cache_modifier=".cg")
        tops_at = tl.load(best_at_ptr + parts, cache_modifier=".cg")
        top = tl.max(tops, axis=0)
        top_at = tl.min(tl.where(tops == top, tops_at, VOCAB), axis=0)
        is_finite = (top < float("inf")) & (top > float("-inf"))
        tl.store(out_ptr + row, tl.where(is_finite, top_at, -1).to(tl.int64))
        tl.store(arrived_ptr + row, 0)


class GreedyScratch:
    """What the parts of a row leave for the last of them; not shared by launches that overlap.

    Args:
        rows: of the launches.
        num_processors: of the GPU; few rows are cut into more parts to keep them all reading.
        device: of the logits.
    """

    def __init__(self, rows: int, num_processors: int, device: torch.device) -> None:
        wanted = triton.next_power_of_2(-(-2 * num_processors // max(rows, 1)))
        self.parts = min(wanted, _MAX_PARTS)
        self.best = torch.empty(rows, self.parts, device=device)
        self.best_at = torch.empty(rows, self.parts, dtype=torch.int32, device=device)
        # Counts back to zero at the end of every launch.
        self.arrived = torch.zeros(rows, dtype=torch.int32, device=device)


def greedy(logits: torch.Tensor, scratch: GreedyScratch) -> torch.Tensor:
    """The token of the largest logit, ties to the smallest ID; see ``openlora.kernels.sampling``.

    Args:
        logits: float [rows, vocab], last dimension contiguous; rows may be 0.
        scratch: for at least as many rows.

    Returns:
        A new int64 [rows]; -1 where a row holds a NaN, or where its largest logit is not finite.
    """
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    overlap = overlaps_launches()
    if rows:
        _greedy_kernel[(rows, scratch.parts)](
            logits,
            out,
            scratch.best,
            scratch.best_at,
            scratch.arrived,
            logits.stride(0),
            VOCAB=vocab,
            PARTS=scratch.parts,
            BLOCK=min(_BLOCK, triton.next_power_of_2(triton.cdiv(vocab, scratch.parts))),
            OVERLAP=overlap,
            num_warps=4,
            **launch_options(overlap),
        )
    return out


@triton.jit
def _take_tokens_kernel(
    token_ids_ptr, sources_ptr, drawn_ptr, out_ptr, num_tokens, BLOCK: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < num_tokens
    source = tl.load(sources_ptr + index, mask=in_range, other=-1)
    given = tl.load(token_ids_ptr + index, mask=in_range, other=0).to(tl.int64)
    drawn = tl.load(drawn_ptr + source, mask=source >= 0, other=0)
    # A failed draw is -1: its request ends when the host reads it; until then any token will do.
    drawn = tl.where(drawn < 0, 0, drawn)
    tl.store(out_ptr + index, tl.where(source >= 0, drawn, given), mask=in_range)


def take_tokens(
    token_ids: torch.Tensor, sources: torch.Tensor, drawn: torch.Tensor
) -> torch.Tensor:
    """drawn[sources] where a source is not -1, else token_ids; draws of -1 become token 0.

    Args:
        token_ids, sources: int32 [tokens].
        drawn: int64, the tokens of the step before.

    Returns:
        A new int64 [tokens].
    """
    out = torch.empty(token_ids.shape, dtype=torch.int64, device=token_ids.device)
    if out.numel():
        _take_tokens_kernel[(triton.cdiv(out.numel(), 256),)](
            token_ids, sources, drawn, out, out.numel(), BLOCK=256, num_warps=4
        )
    return out
