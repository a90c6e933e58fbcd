"""The gated activations of the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up, elementwise.

    Args:
        gate_up: [rows, 2 · intermediate], gate first; rows may be 0.

    Returns:
        A new [rows, intermediate] of the same dtype.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """GELU(gate) · up in GELU's approximation by tanh; shapes as in ``silu_and_mul``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)
