"""How the extras of single rows compute: in torch, or as deterministic steps need it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from openlora.kernels.norms import norm_heads, rms_norm


class ExtraMath:
    """In torch, on any device."""

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x Wᵀ; weight: [out, in], any strides."""
        return F.linear(x, weight)

    def add_product(self, y: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """y + x b, a new tensor; b: [in, out]."""
        return y.addmm(x, b)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As ``kernels.norms.rms_norm``."""
        return rms_norm(x, weight, eps)

    def norm_heads(
        self,
        heads: torch.Tensor,
        q_norm: torch.Tensor,
        k_norm: torch.Tensor,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        """As ``kernels.norms.norm_heads``."""
        norm_heads(heads, q_norm, k_norm, num_kv_heads, eps)


TORCH_MATH = ExtraMath()
