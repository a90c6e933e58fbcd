# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""RMSNorm in Triton: of rows, with or without a sum before it, and of the heads of q and k."""

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
