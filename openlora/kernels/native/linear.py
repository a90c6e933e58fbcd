"""Dense linears in the layout of the native kernels."""

from __future__ import annotations

import torch

from openlora.kernels.linear import Linear
from openlora.kernels.native.library import Arena, Kind, NativeKernels, Op, Step, make_op


class NativeLinear(Linear):
    """y = x Wᵀ + b by the native kernels, for any number of rows; fp32 or bf16.

    Args:
        kernels: that pack and multiply.
        arena: where the packed weight goes.
        weight, bias: as in ``Linear``; kept only packed, the bias in fp32.
    """

    __slots__ = ("_kernels",)

    def __init__(
        self,
        kernels: NativeKernels,
        arena: Arena,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        self._kernels = kernels
        self.bias = None if bias is None else bias.float()
        self.out_features, self.in_features = weight.shape
        self.is_packed = True
        self.weight = kernels.pack(weight, arena)

    def op(self, x: torch.Tensor, y: torch.Tensor) -> Op:
        """The operation y = linear(x), without LoRA; x and y: [rows, …] contiguous."""
        return make_op(
            Kind.LINEAR,
            x.dtype,
            (x, self.weight, self.bias, y),
            (self.in_features, self.out_features, -1),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.out_features)
        self._kernels.run(self.op(x, y), Step(rows=x.shape[0]))
        return y
