"""The extras of single rows on the Triton kernels whose rows do not depend on each other."""

from __future__ import annotations

import torch

from openlora.engine.extra_math import ExtraMath
from openlora.kernels import triton_norms
from openlora.kernels.triton_invariant_linear import InvariantLinear, SplitScratch


class InvariantExtraMath(ExtraMath):
    """For deterministic steps.

    Args:
        device: of the extras.
    """

    def __init__(self, device: torch.device) -> None:
        # Nothing is summed in parts, so it stays as small as it is.
        self._scratch = SplitScratch(device)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return InvariantLinear(self._scratch, weight, splits=1)(x.contiguous())

    def add_product(self, y: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return y + self.product(x, b.t())

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return triton_norms.rms_norm(x.contiguous(), weight, eps)

    def norm_heads(
        self,
        heads: torch.Tensor,
        q_norm: torch.Tensor,
        k_norm: torch.Tensor,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        triton_norms.norm_heads(heads, q_norm, k_norm, num_kv_heads, eps)
