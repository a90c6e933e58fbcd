"""The Triton norms against the torch references they stand in for."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels import norms, triton_norms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter knows no bfloat16 arithmetic.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, HALF: 2e-2}


@pytest.mark.parametrize("rows", [0, 1, 15, 17])
@pytest.mark.parametrize("hidden", [64, 72, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_norms(rows: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, hidden, device=DEVICE).to(dtype)
    residual = torch.randn(rows, hidden, device=DEVICE).to(dtype)
    weight = torch.randn(hidden, device=DEVICE).to(dtype)
    expected_residual = residual.clone()
    expected = norms.add_rms_norm(x, expected_residual, weight, 1e-5)
    out = triton_norms.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(residual, expected_residual)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(
        triton_norms.rms_norm(x, weight, 1e-5),
        norms.rms_norm(x, weight, 1e-5),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (18, 3, 24)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, HALF])
def test_norm_heads(
    rows: int, num_heads: int, num_kv_heads: int, head_dim: int, weight_dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    qkv = torch.randn(rows, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE).to(HALF)
    q_norm, k_norm = torch.randn(2, head_dim, device=DEVICE).to(weight_dtype)
    expected = qkv.clone()
    norms.norm_heads(expected, q_norm, k_norm, num_kv_heads, 1e-6)
    triton_norms.norm_heads(qkv, q_norm, k_norm, num_kv_heads, 1e-6)
    torch.testing.assert_close(qkv, expected, rtol=TOLERANCE[HALF], atol=TOLERANCE[HALF])


def test_norms_with_an_fp32_weight_round_the_product() -> None:
    x, weight = torch.randn(3, 72, device=DEVICE).to(HALF), torch.randn(72, device=DEVICE)
    torch.testing.assert_close(
        triton_norms.rms_norm(x, weight, 1e-6),
        norms.rms_norm(x, weight, 1e-6),
        rtol=TOLERANCE[HALF],
        atol=TOLERANCE[HALF],
    )
