# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""Rotary embedding and the write into the paged KV cache in one Triton kernel."""

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


@triton.jit
def _rope_and_write_kv_kernel(
    qkv_ptr,
    positions_ptr,
    slots_ptr,
    inv_freq_ptr,
    cache_ptr,
    v_offset,
    factor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    HALF: tl.constexpr = ROTARY_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    heads = group * HEADS_PADDED + tl.arange(0, HEADS_PADDED)
    dims = tl.arange(0, HALF_PADDED)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions_ptr + token).to(tl.float32)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    angle = position * tl.load(inv_freq_ptr + dims, mask=dims < HALF, other=0.0)
    cos, sin = tl.cos(angle) * factor, tl.sin(angle) * factor
    is_rotated = heads < NUM_HEADS + NUM_KV_HEADS
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (dims < HALF)[None, :]
    row = token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    at = qkv_ptr + row + heads[:, None] * HEAD_DIM + dims[None, :]
    low = tl.load(at, mask=mask, other=0.0)
    high = tl.load(at + HALF, mask=mask, other=0.0)
    low_wide, high_wide = low.to(tl.float32), high.to(tl.float32)
    low_out = (low_wide * cos[None, :] - high_wide * sin[None, :]).to(low.dtype)
    high_out = (high_wide * cos[None, :] + low_wide * sin[None, :]).to(low.dtype)
    low_out = tl.where(is_rotated[:, None], low_out, low)
    high_out = tl.where(is_rotated[:, None], high_out, high)
    is_query = heads < NUM_HEADS
    tl.store(at, low_out, mask=mask & is_query[:, None])
    tl.store(at + HALF, high_out, mask=mask & is_query[:, None])
    kv_head = (heads - NUM_HEADS) % NUM_KV_HEADS
    cache_row = (slot // BLOCK_SIZE) * NUM_KV_HEADS + kv_head
    cache_row = cache_row * BLOCK_SIZE + slot % BLOCK_SIZE
    half_cache = tl.where(heads >= NUM_HEADS + NUM_KV_HEADS, v_offset, 0)
    to = cache_ptr + (cache_row * HEAD_DIM + half_cache)[:, None] + dims[None, :]
    # Queries go nowhere: they take the slot of padding.
    owner = tl.where(heads >= NUM_HEADS, slot, -1)
    kv_mask = mask & (owner >= 0)[:, None]
    tl.store(to, low_out, mask=kv_mask)
    tl.store(to + HALF, high_out, mask=kv_mask)
    if ROTARY_DIM < HEAD_DIM:
        # What is not rotated goes into the cache as it is.
        rest = ROTARY_DIM + tl.arange(0, REST_PADDED)
        in_head = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (rest < HEAD_DIM)[None, :]
        value = tl.load(
            qkv_ptr + row + heads[:, None] * HEAD_DIM + rest[None, :], mask=in_head, other=0.0
        )
        to = cache_ptr + (cache_row * HEAD_DIM + half_cache)[:, None] + rest[None, :]
        tl.store(to, value, mask=in_head & (owner >= 0)[:, None])


def rope_and_write_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    factor: float = 1.0,
) -> None:
    """Rotate q of every token in place; write its rotated k and its v into the paged cache.

    The rotation is that of ``openlora.kernels.kv_write``, with the angles taken in fp32 on the fly
    and applied in fp32. k and v of ``qkv`` keep their bits.

    Args:
        qkv: [tokens, num_heads + 2 · num_kv_heads, head_dim] contiguous; q in place.
        positions: [tokens] int32.
        inv_freq: [rotary_dim / 2] fp32; so many of a head's first dimensions are rotated.
        kv_cache: one layer, [2, num_blocks, num_kv_heads, block_size, head_dim] contiguous.
        slots: [tokens] int32, block ID · block_size + place in the block; -1: k and v are dropped
            (the padding rows of a captured batch).
        factor: multiplies cos and sin.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_all_heads, rotary_dim = qkv.shape[1], 2 * inv_freq.shape[0]
    heads_padded = min(triton.next_power_of_2(num_all_heads), 16)
    overlap = overlaps_launches()
    if qkv.shape[0]:
        _rope_and_write_kv_kernel[(qkv.shape[0], triton.cdiv(num_all_heads, heads_padded))](
            qkv,
            positions,
            slots,
            inv_freq,
            kv_cache,
            kv_cache.stride(0),
            factor,
            NUM_HEADS=num_all_heads - 2 * num_kv_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            ROTARY_DIM=rotary_dim,
            BLOCK_SIZE=block_size,
            HEADS_PADDED=heads_padded,
            HALF_PADDED=triton.next_power_of_2(rotary_dim // 2),
            REST_PADDED=triton.next_power_of_2(max(head_dim - rotary_dim, 1)),
            OVERLAP=overlap,
            num_warps=4,
            **launch_options(overlap),
        )
