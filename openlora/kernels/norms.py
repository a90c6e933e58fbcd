"""RMSNorm, alone and behind a residual addition (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis.

    Args:
        x: [rows, hidden]; rows may be 0.
        weight: [hidden], same dtype.

    Returns:
        A new [rows, hidden]; statistics are taken in fp32.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x, in place; returns rms_norm(residual, weight, eps) as a new tensor.

    Shapes and dtypes as in ``rms_norm``; ``residual`` has the shape of ``x``.
    """
    residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, eps)
