# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""Attention over the paged KV cache in Triton, one kernel for decodes and for chunks of prefill.

What a query gets depends on its own sequence and position alone, bit for bit: positions are cut
into splits at fixed places, each goes through the online softmax in tiles of one
size, and the splits' sums are merged in their order. Whether one program goes through all splits
or each has its own, which is faster where queries are few, changes nothing: what is merged are the
same fp32 numbers, and no multiplication is fused with an addition, which compilers would do in one
place and not in another. Positions that a query does not see weigh exactly 0.

Tiles and cache as in ``triton_prefill_attention``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openlora.kernels.invariant_splits import UnitRows, invariant_tile_tokens, padded_group
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


@triton.jit
def _split_start(split, SMALL: tl.constexpr, NUM_SMALL: tl.constexpr, LARGE: tl.constexpr):
    """First position of a split."""
    return min(split, NUM_SMALL) * SMALL + max(split - NUM_SMALL, 0) * LARGE


@triton.jit
def _split_of(position, SMALL: tl.constexpr, NUM_SMALL: tl.constexpr, LARGE: tl.constexpr):
    """The split that holds a position."""
    behind = max(position - NUM_SMALL * SMALL, 0)
    return min(position // SMALL, NUM_SMALL + behind // LARGE)


@triton.jit
def _merged(top, total, acc, split_top, split_total, split_acc):
    """The online softmax's state of two sets of positions, of theirs."""
    new_top = tl.maximum(top, split_top)
    kept = tl.exp2(top - new_top)
    added = tl.exp2(split_top - new_top)
    return (
        new_top,
        total * kept + split_total * added,
        acc * kept[:, None] + split_acc * added[:, None],
    )


@triton.jit
def _store_attended(out_at, acc, total, mask):
    # A row of the tile that is no query has seen nothing.
    total = tl.where(total > 0.0, total, 1.0)
    tl.store(out_at, (acc / total[:, None]).to(out_at.dtype.element_ty), mask=mask)


@triton.jit
def _invariant_attention_kernel(
    q_ptr,
    cache_ptr,
    block_tables_ptr,
    context_lens_ptr,
    spans_ptr,
    tiles_ptr,
    out_ptr,
    partial_ptr,
    partial_top_ptr,
    partial_total_ptr,
    arrived_ptr,
    scale_log2,
    q_stride,
    table_stride,
    v_offset,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SMALL: tl.constexpr,
    NUM_SMALL: tl.constexpr,
    LARGE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BLOCK_T * BLOCK_G
    UNSEEN: tl.constexpr = -1e30
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(tiles_ptr + tile * 2)
    first = tl.load(tiles_ptr + tile * 2 + 1)
    token_start = tl.load(spans_ptr + row * 3)
    num_tokens = tl.load(spans_ptr + row * 3 + 1)
    position_start = tl.load(context_lens_ptr + row) - num_tokens
    # Padding has a context of 0, and with it no split.
    end = position_start + min(first + BLOCK_T, num_tokens)
    begin = 0
    if WINDOW:
        begin = max(position_start + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    first_split = _split_of(begin, SMALL, NUM_SMALL, LARGE)
    num_splits = first_split
    if end > begin:
        num_splits = _split_of(end - 1, SMALL, NUM_SMALL, LARGE) + 1
    working = min(tl.num_programs(2), num_splits - first_split)
    if part < working:
        m = tl.arange(0, BLOCK_M)
        dims = tl.arange(0, BLOCK_D)
        columns = tl.arange(0, BLOCK_N)
        token = first + m // BLOCK_G
        head = kv_head * GROUP + m % BLOCK_G
        is_real = (token < num_tokens) & (m % BLOCK_G < GROUP)
        q_mask = is_real[:, None] & (dims < HEAD_DIM)[None, :]
        q_row = (token_start + token).to(tl.int64)
        q_at = q_ptr + (q_row * q_stride + head * HEAD_DIM)[:, None] + dims[None, :]
        q = tl.load(q_at, mask=q_mask, other=0.0)
        position = position_start + token
        table = block_tables_ptr + row.to(tl.int64) * table_stride
        # Splits of one (tile, KV head) lie together; only tiles of one token are split up.
        pair = tile.to(tl.int64) * NUM_KV_HEADS + kv_head
        top = tl.full([BLOCK_M], UNSEEN, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for split in range(first_split + part, num_splits, tl.num_programs(2)):
            split_top = tl.full([BLOCK_M], UNSEEN, dtype=tl.float32)
            split_total = tl.zeros([BLOCK_M], dtype=tl.float32)
            split_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            start = max(begin, _split_start(split, SMALL, NUM_SMALL, LARGE))
            stop = min(end, _split_start(split + 1, SMALL, NUM_SMALL, LARGE))
            for n_start in range(start, stop, BLOCK_N):
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
                is_seen = n[None, :] <= position[:, None]
                if WINDOW:
                    is_seen = is_seen & (n[None, :] > position[:, None] - WINDOW)
                scores = tl.where(is_seen, scores, float("-inf"))
                # Never -inf: what a row does not see then weighs 0, also where it sees nothing.
                new_top = tl.maximum(split_top, tl.max(scores, axis=1))
                split_total, split_acc = absorb(
                    scores, v, new_top, split_top, split_total, split_acc
                )
                split_top = new_top
            if working > 1:
                place = (pair * MAX_SPLITS + split) * BLOCK_G + m
                tl.store(
                    partial_ptr + place[:, None] * HEAD_DIM + dims[None, :], split_acc, mask=q_mask
                )
                tl.store(partial_top_ptr + place, split_top, mask=is_real)
                tl.store(partial_total_ptr + place, split_total, mask=is_real)
            top, total, acc = _merged(top, total, acc, split_top, split_total, split_acc)
        out_row = q_row * (NUM_KV_HEADS * GROUP) + head
        out_at = out_ptr + out_row[:, None] * HEAD_DIM + dims[None, :]
        if working == 1:
            _store_attended(out_at, acc, total, q_mask)
        else:
            # Whoever arrives last merges all splits, in their order.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
            if arrived == working - 1:
                tl.debug_barrier()
                top = tl.full([BLOCK_M], UNSEEN, dtype=tl.float32)
                total = tl.zeros([BLOCK_M], dtype=tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
                for split in range(first_split, num_splits):
                    place = (pair * MAX_SPLITS + split) * BLOCK_G + m
                    split_acc = tl.load(
                        partial_ptr + place[:, None] * HEAD_DIM + dims[None, :],
                        mask=q_mask,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    split_top = tl.load(
                        partial_top_ptr + place, mask=is_real, other=UNSEEN, cache_modifier=".cg"
                    )
                    split_total = tl.load(
                        partial_total_ptr + place, mask=is_real, other=0.0, cache_modifier=".cg"
                    )
                    top, total, acc = _merged(top, total, acc, split_top, split_total, split_acc)
                _store_attended(out_at, acc, total, q_mask)
                tl.store(arrived_ptr + pair, 0)


def invariant_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    spans: torch.Tensor | None,
    tiles: torch.Tensor | None,
    scale: float,
    unit_rows: UnitRows,
    out: torch.Tensor,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """Causal attention of each row's tokens over its own sequence's cached positions.

    Args:
        q: [tokens, num_heads, head_dim], rotated; the token stride is free.
        kv_cache: one layer, contiguous; the tokens' own k and v are written already.
        block_tables: int32 [rows, blocks].
        context_lens: int32 [rows], the row's tokens included; 0 leaves its part of the result
            unwritten (padding).
        spans: int32 [rows, 3]: first token in q, tokens of the row, anything. None, and ``tiles``
            as well: every token of q is a row.
        tiles: int32 [tiles, 2]: row, first token of the tile within its row; every row is cut
            into tiles of ``invariant_tile_tokens``.
        scale: usually 1/√head_dim.
        unit_rows: the engine's splits, and for rows of one token how many programs a row is dealt
            to. Not shared by launches that may overlap.
        out: [tokens, num_heads · head_dim] of q's dtype, contiguous; written where a tile is.
        window, soft_cap: as for ``decode_attention``.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    parts = 1
    if spans is None or tiles is None:
        spans, tiles, parts = unit_rows.spans, unit_rows.tiles[:num_tokens], unit_rows.parts
    if not tiles.shape[0]:
        return
    row_bytes = triton.next_power_of_2(head_dim) * q.element_size()
    wide = row_bytes > 256
    overlap = overlaps_launches()
    _invariant_attention_kernel[(tiles.shape[0], num_kv_heads, parts)](
        q,
        kv_cache,
        block_tables,
        context_lens,
        spans,
        tiles,
        out,
        unit_rows.partial,
        unit_rows.top,
        unit_rows.total,
        unit_rows.arrived,
        score_factor(scale, soft_cap),
        q.stride(0),
        block_tables.stride(0),
        kv_cache.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SMALL=unit_rows.splits.small,
        NUM_SMALL=unit_rows.splits.num_small,
        LARGE=unit_rows.splits.large,
        MAX_SPLITS=unit_rows.max_splits,
        WINDOW=window,
        SOFT_CAP=soft_cap,
        BLOCK_G=padded_group(num_heads, num_kv_heads),
        BLOCK_T=invariant_tile_tokens(num_heads, num_kv_heads),
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        BLOCK_N=64 if not wide else 32 if row_bytes == 512 else 16,
        OVERLAP=overlap,
        num_warps=8 if head_dim > 128 else 4,
        num_stages=1 if wide else 2,
        enable_fp_fusion=False,
        **launch_options(overlap),
    )
