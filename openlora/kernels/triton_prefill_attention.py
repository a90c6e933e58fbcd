# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""Prefill attention over the paged KV cache in Triton: causal, for chunks behind cached positions.

As in ``triton_attention``, a tile packs the query heads that share a KV head.
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


@triton.jit
def _prefill_kernel(
    q_ptr,
    cache_ptr,
    block_tables_ptr,
    tiles_ptr,
    rows_ptr,
    out_ptr,
    scale_log2,
    q_stride,
    table_stride,
    v_offset,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BLOCK_T * BLOCK_G
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(tiles_ptr + tile * 2)
    first = tl.load(tiles_ptr + tile * 2 + 1)
    token_start = tl.load(rows_ptr + row * 3)
    num_tokens = tl.load(rows_ptr + row * 3 + 1)
    position_start = tl.load(rows_ptr + row * 3 + 2)
    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    # A tile's rows are (token, head of the group), heads fastest.
    token = first + m // BLOCK_G
    head = kv_head * GROUP + m % BLOCK_G
    is_real = (token < num_tokens) & (m % BLOCK_G < GROUP)
    q_mask = is_real[:, None] & (dims < HEAD_DIM)[None, :]
    q_row = (token_start + token).to(tl.int64)
    q_at = q_ptr + (q_row * q_stride + head * HEAD_DIM)[:, None] + dims[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0)
    position = position_start + token
    end = position_start + min(first + BLOCK_T, num_tokens)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    table = block_tables_ptr + row.to(tl.int64) * table_stride
    begin = 0
    if WINDOW:
        begin = max(position_start + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    for n_start in range(begin, end, BLOCK_N):
        n = n_start + columns
        k, v = load_positions(
            cache_ptr, table, n, end, dims, kv_head, v_offset, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE
        )
        scores = scaled_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale_log2, SOFT_CAP)
        is_seen = n[None, :] <= position[:, None]
        if WINDOW:
            is_seen = is_seen & (n[None, :] > position[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        # Position 0 is visible to every row, so the first tile makes each maximum finite.
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        if WINDOW:
            # Unless it lies before the window of the tile's later rows.
            new_top = tl.maximum(new_top, -1e30)
        total, acc = absorb(scores, v, new_top, top, total, acc)
        top = new_top
    out_row = q_row * (NUM_KV_HEADS * GROUP) + head
    out_at = out_ptr + out_row[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_at, (acc / total[:, None]).to(q.dtype), mask=q_mask)


PREFILL_TILE_ROWS = 128


def prefill_tile_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Tokens of one query tile of ``prefill_attention``."""
    return max(PREFILL_TILE_ROWS // triton.next_power_of_2(num_heads // num_kv_heads), 1)


def prefill_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    rows: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """Causal attention of chunks of queries over their own sequence's cached positions.

    Args:
        q: [tokens, num_heads, head_dim], rotated; the token stride is free.
        kv_cache: one layer, contiguous; the chunk's own k and v are written already.
        block_tables: int32 [sequences, blocks].
        rows: int32 [sequences, 3]: first token in q, tokens of the chunk, position of the first.
        tiles: int32 [tiles, 2]: sequence, first token of the tile within its chunk; every chunk is
            cut into tiles of ``prefill_tile_tokens``.
        scale: usually 1/√head_dim.
        out: [tokens, num_heads · head_dim] of q's dtype, contiguous; written where a tile is.
        window, soft_cap: as for ``decode_attention``.
    """
    _, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    block_g = triton.next_power_of_2(group)
    row_bytes = triton.next_power_of_2(head_dim) * q.element_size()
    wide = row_bytes > 256
    overlap = overlaps_launches()
    if tiles.shape[0]:
        _prefill_kernel[(tiles.shape[0], num_kv_heads)](
            q,
            kv_cache,
            block_tables,
            tiles,
            rows,
            out,
            score_factor(scale, soft_cap),
            q.stride(0),
            block_tables.stride(0),
            kv_cache.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            WINDOW=window,
            SOFT_CAP=soft_cap,
            BLOCK_G=block_g,
            BLOCK_T=prefill_tile_tokens(num_heads, num_kv_heads),
            BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
            BLOCK_N=64 if not wide else 32 if row_bytes == 512 else 16,
            OVERLAP=overlap,
            num_warps=8,
            num_stages=1 if wide else 2,
            **launch_options(overlap),
        )
