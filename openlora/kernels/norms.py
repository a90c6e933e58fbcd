"""RMSNorm, alone and behind a residual addition (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis.

    Args:
        x: [rows, hidden]; rows may be 0.
        weight: [hidden], same dtype, or fp32: then the product is rounded, not its factors.

    Returns:
        A new [rows, hidden]; statistics are taken in fp32.
    """
    if weight.dtype is not x.dtype:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x, in place; returns rms_norm(residual, weight, eps) as a new tensor.

    Shapes and dtypes as in ``rms_norm``; ``residual`` has the shape of ``x``.
    """
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def norm_heads(
    qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, num_kv_heads: int, eps: float
) -> None:
    """Norm every head of q and of k for itself, in place (QK-norm, Dehghani et al. 2023).

    Args:
        qkv: [tokens, num_heads + 2 · num_kv_heads, head_dim]: q, k, v heads.
        q_norm, k_norm: [head_dim], as ``weight`` in ``rms_norm``.
    """
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    q, k = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads]
    q.copy_(rms_norm(q, q_norm, eps))
    k.copy_(rms_norm(k, k_norm, eps))
