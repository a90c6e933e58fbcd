# ruff: noqa: ANN001, ANN201, ANN202 - Triton kernels take pointers and compile-time constants.
"""The small fused kernels of a decoder layer: norm with residual, rotary with KV write, SiLU·up."""

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
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    in_row = columns < HIDDEN
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    # The weight comes from a cold line either way: asked for first, it arrives with x.
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + start + columns, mask=in_row, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + start + columns, mask=in_row, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + start + columns, x, mask=in_row)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / HIDDEN + eps)
    if weight.dtype == x.dtype:
        out = (wide * scale).to(x.dtype) * weight
    else:
        # An fp32 weight: the product is rounded, not its factors.
        out = (wide * scale * weight).to(x.dtype)
    tl.store(out_ptr + start + columns, out, mask=in_row)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis; see ``openlora.kernels.norms``.

    Args:
        x: [rows, hidden] contiguous; rows may be 0.
        weight: [hidden], of x's dtype or fp32.
    """
    return _launch_norm(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x, in place; returns rms_norm(residual, weight, eps) as a new tensor."""
    return _launch_norm(x, residual, weight, eps)


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    out = torch.empty_like(x)
    rows, hidden = x.shape
    if rows:
        block = triton.next_power_of_2(hidden)
        overlap = overlaps_launches()
        _rms_norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            eps,
            HIDDEN=hidden,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            OVERLAP=overlap,
            num_warps=min(max(block // 512, 1), 8),
            **launch_options(overlap),
        )
    return out


@triton.jit
def _norm_heads_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    row_stride,
    NUM_HEADS: tl.constexpr,
    NUM_NORMED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    heads = tl.program_id(1) * HEADS_PADDED + tl.arange(0, HEADS_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    in_head = dims < HEAD_DIM
    q_norm = tl.load(q_norm_ptr + dims, mask=in_head, other=0.0)
    k_norm = tl.load(k_norm_ptr + dims, mask=in_head, other=0.0)
    weight = tl.where((heads < NUM_HEADS)[:, None], q_norm[None, :], k_norm[None, :])
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * row_stride
    at = qkv_ptr + row + heads[:, None] * HEAD_DIM + dims[None, :]
    mask = (heads < NUM_NORMED)[:, None] & in_head[None, :]
    x = tl.load(at, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
    if weight.dtype == x.dtype:
        out = (wide * scale).to(x.dtype) * weight
    else:
        out = (wide * scale * weight).to(x.dtype)
    tl.store(at, out, mask=mask)


def norm_heads(
    qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, num_kv_heads: int, eps: float
) -> None:
    """Norm every head of q and of k for itself, in place; see ``openlora.kernels.norms``.

    Args:
        qkv: [tokens, num_heads + 2 · num_kv_heads, head_dim] contiguous; v keeps its bits.
        q_norm, k_norm: [head_dim], of qkv's dtype or fp32.
    """
    tokens, num_all_heads, head_dim = qkv.shape
    num_normed = num_all_heads - num_kv_heads
    heads_padded = min(triton.next_power_of_2(num_normed), 16)
    overlap = overlaps_launches()
    if tokens:
        _norm_heads_kernel[(tokens, triton.cdiv(num_normed, heads_padded))](
            qkv,
            q_norm,
            k_norm,
            eps,
            qkv.stride(0),
            NUM_HEADS=num_normed - num_kv_heads,
            NUM_NORMED=num_normed,
            HEAD_DIM=head_dim,
            HEADS_PADDED=heads_padded,
            DIM_PADDED=triton.next_power_of_2(head_dim),
            OVERLAP=overlap,
            num_warps=4,
            **launch_options(overlap),
        )


@triton.jit
def activate(gate, up, GELU: tl.constexpr):
    """act(gate) · up; the activation is rounded before the product."""
    wide = gate.to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        # tanh by way of the sigmoid: one exponential.
        activated = wide / (1.0 + tl.exp(-2.0 * inner))
    else:
        activated = wide / (1.0 + tl.exp(-wide))
    return activated.to(gate.dtype) * up


@triton.jit
def _gate_kernel(
    gate_up_ptr,
    out_ptr,
    num_elements,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < num_elements
    row = index // WIDTH
    # gate of element (row, column) lies at row · 2 · WIDTH + column, up a WIDTH behind it.
    at = index + row * WIDTH
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up_ptr + at, mask=in_range, other=0.0)
    up = tl.load(gate_up_ptr + at + WIDTH, mask=in_range, other=0.0)
    tl.store(out_ptr + index, activate(gate, up, GELU), mask=in_range)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up; see ``openlora.kernels.activation``.

    Args:
        gate_up: [rows, 2 · intermediate] contiguous, gate first; rows may be 0.
    """
    return _launch_gate(gate_up, gelu=False)


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """GELU(gate), by its tanh approximation, · up; as ``silu_and_mul``."""
    return _launch_gate(gate_up, gelu=True)


def _launch_gate(gate_up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        block = 1024
        overlap = overlaps_launches()
        _gate_kernel[(triton.cdiv(out.numel(), block),)](
            gate_up,
            out,
            out.numel(),
            WIDTH=width,
            BLOCK=block,
            GELU=gelu,
            OVERLAP=overlap,
            num_warps=4,
            **launch_options(overlap),
        )
    return out


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
