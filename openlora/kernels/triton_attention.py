# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""Decode attention over the paged KV cache in Triton: one query a sequence, split over positions.

A tile packs the query heads that share a KV head (grouped-query attention), so that K and V are
read once per KV head, and runs FlashAttention's online softmax (Dao et al. 2022; split-KV
after Flash-Decoding). One layer's cache is [2, num_blocks, num_kv_heads, block_size, head_dim].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openlora.kernels.triton_attention_tiles import (
    absorb,
    load_positions,
    scaled_scores,
    score_factor,
)
from openlora.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch_options,
    overlaps_launches,
)

MIN_SPLIT = 128
"""Fewest positions worth a split of their own."""


@triton.jit
def _decode_kernel(
    q_ptr,
    cache_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    arrived_ptr,
    scale_log2,
    q_stride,
    table_stride,
    v_offset,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    context_len = tl.load(context_lens_ptr + row)
    first = 0
    if WINDOW:
        first = max(context_len - WINDOW, 0)
    seen = context_len - first
    # A short context is not worth splitting; the programs of splits it lacks end here.
    num_splits = min(SPLITS, tl.cdiv(seen, MIN_SPLIT))
    per_split = tl.cdiv(tl.cdiv(seen, BLOCK_N), max(num_splits, 1)) * BLOCK_N
    start = first + split * per_split
    end = min(start + per_split, context_len)
    num_splits = tl.cdiv(seen, max(per_split, 1))
    if start < end:
        heads = tl.arange(0, BLOCK_G)
        dims = tl.arange(0, BLOCK_D)
        columns = tl.arange(0, BLOCK_N)
        q_mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        head = kv_head * GROUP + heads
        q = tl.load(
            q_ptr + row.to(tl.int64) * q_stride + head[:, None] * HEAD_DIM + dims[None, :],
            mask=q_mask,
            other=0.0,
        )
        top = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_G], dtype=tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
        table = block_tables_ptr + row.to(tl.int64) * table_stride
        for n_start in range(start, end, BLOCK_N):
            n = n_start + columns
            k, v = load_positions(
                cache_ptr,
                table,
                n,
                end,
                dims,
                kv_head,
                v_offset,
                NUM_KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = scaled_scores(scores, scale_log2, SOFT_CAP)
            scores = tl.where((n < end)[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            total, acc = absorb(scores, v, new_top, top, total, acc)
            top = new_top
        out_row = row.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
        out_at = out_ptr + out_row[:, None] * HEAD_DIM + dims[None, :]
        if num_splits == 1:
            tl.store(out_at, (acc / total[:, None]).to(q.dtype), mask=q_mask)
        else:
            # Splits of one (row, head) lie together: partial[row, kv_head, split, group, dim].
            pair = row.to(tl.int64) * NUM_KV_HEADS + kv_head
            part = (pair * SPLITS + split) * GROUP + heads
            tl.store(
                partial_ptr + part[:, None] * HEAD_DIM + dims[None, :],
                acc / total[:, None],
                mask=q_mask,
            )
            tl.store(partial_lse_ptr + part, top + tl.log2(total), mask=heads < GROUP)
            # Whoever arrives last adds up, always in the order of the splits: bit-equal repeats.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
            if arrived == num_splits - 1:
                tl.debug_barrier()
                top = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
                total = tl.zeros([BLOCK_G], dtype=tl.float32)
                acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
                for other in range(num_splits):
                    part = (pair * SPLITS + other) * GROUP + heads
                    lse = tl.load(
                        partial_lse_ptr + part,
                        mask=heads < GROUP,
                        other=float("-inf"),
                        cache_modifier=".cg",
                    )
                    value = tl.load(
                        partial_ptr + part[:, None] * HEAD_DIM + dims[None, :],
                        mask=q_mask,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    new_top = tl.maximum(top, tl.where(heads < GROUP, lse, 0.0))
                    weight = tl.exp2(lse - new_top)
                    rescale = tl.exp2(top - new_top)
                    total = total * rescale + weight
                    acc = acc * rescale[:, None] + value * weight[:, None]
                    top = new_top
                tl.store(out_at, (acc / total[:, None]).to(q.dtype), mask=q_mask)
                tl.store(arrived_ptr + pair, 0)


class DecodeScratch:
    """What the splits of a decode launch leave for the last of them; shared by all layers.

    Args:
        rows: most sequences of a launch.
        num_heads, num_kv_heads, head_dim: of the model.
        splits: most splits of one sequence (``decode_splits``).
        device: of the cache.
    """

    def __init__(
        self,
        rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        splits: int,
        device: torch.device,
    ) -> None:
        self.splits = splits
        shape = (rows, num_kv_heads, splits, num_heads // num_kv_heads)
        self.partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
        self.lse = torch.empty(shape, dtype=torch.float32, device=device)
        # Counts back to zero at the end of every launch.
        self.arrived = torch.zeros((rows, num_kv_heads), dtype=torch.int32, device=device)


def decode_splits(rows: int, num_kv_heads: int, num_processors: int, max_model_len: int) -> int:
    """How many splits let ``rows`` sequences keep all processors reading."""
    wanted = -(-2 * num_processors // max(rows * num_kv_heads, 1))
    return max(1, min(wanted, 32, -(-max_model_len // MIN_SPLIT)))


def _decode_tile(num_pairs: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(positions a tile, warps, pipeline stages), measured on an H100 with heads of 128.

    Many (row, KV head) pairs hide each other's latency with small tiles; few need large ones.
    Tiles of wider heads are smaller, to fit shared memory.
    """
    if dtype == torch.float32 or head_dim > 128:
        return 32, 4, 2
    return (32, 2, 4) if num_pairs > 256 else (128, 4, 2)


def decode_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    scratch: DecodeScratch,
    out: torch.Tensor,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """Softmax(q Kᵀ · scale) V of one query per sequence over its cached positions.

    Args:
        q: [rows, num_heads, head_dim], rotated; the row stride is free, the rest contiguous.
        kv_cache: one layer, contiguous.
        block_tables: int32 [rows, blocks], entries beyond a context are never read.
        context_lens: int32 [rows]; 0 leaves that row of the result unwritten (padding).
        scale: usually 1/√head_dim.
        scratch: for at least as many rows; not shared by launches that may overlap.
        out: [rows, num_heads · head_dim] of q's dtype, contiguous; written.
        window: positions that a query sees, its own included; 0: all.
        soft_cap: scores s become soft_cap · tanh(s / soft_cap) before the softmax; 0: not.
    """
    rows, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    overlap = overlaps_launches()
    block_n, num_warps, num_stages = _decode_tile(rows * num_kv_heads, head_dim, q.dtype)
    if rows:
        _decode_kernel[(rows, num_kv_heads, scratch.splits)](
            q,
            kv_cache,
            block_tables,
            context_lens,
            out,
            scratch.partial,
            scratch.lse,
            scratch.arrived,
            score_factor(scale, soft_cap),
            q.stride(0),
            block_tables.stride(0),
            kv_cache.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            SPLITS=scratch.splits,
            MIN_SPLIT=MIN_SPLIT,
            WINDOW=window,
            SOFT_CAP=soft_cap,
            BLOCK_G=max(triton.next_power_of_2(group), 16),
            BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
            BLOCK_N=block_n,
            OVERLAP=overlap,
            num_warps=num_warps,
            num_stages=num_stages,
            **launch_options(overlap),
        )
