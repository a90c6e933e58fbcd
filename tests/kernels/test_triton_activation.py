"""The Triton activations against the torch references they stand in for."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels import activation, triton_activation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter knows no bfloat16 arithmetic.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, HALF: 2e-2}


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("width", [24, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations(rows: int, width: int, dtype: torch.dtype, name: str) -> None:
    gate_up = torch.randn(rows, 2 * width, device=DEVICE).to(dtype)
    torch.testing.assert_close(
        getattr(triton_activation, name)(gate_up),
        getattr(activation, name)(gate_up),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )
