"""The fused Triton kernels against the torch references they stand in for."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels import activation, kv_write, norms, triton_fused
from openlora.kernels.rope import rope_cos_sin

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
    out = triton_fused.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(residual, expected_residual)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(
        triton_fused.rms_norm(x, weight, 1e-5),
        norms.rms_norm(x, weight, 1e-5),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("width", [24, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations(rows: int, width: int, dtype: torch.dtype, name: str) -> None:
    gate_up = torch.randn(rows, 2 * width, device=DEVICE).to(dtype)
    torch.testing.assert_close(
        getattr(triton_fused, name)(gate_up),
        getattr(activation, name)(gate_up),
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
    triton_fused.norm_heads(qkv, q_norm, k_norm, num_kv_heads, 1e-6)
    torch.testing.assert_close(qkv, expected, rtol=TOLERANCE[HALF], atol=TOLERANCE[HALF])


def test_norms_with_an_fp32_weight_round_the_product() -> None:
    x, weight = torch.randn(3, 72, device=DEVICE).to(HALF), torch.randn(72, device=DEVICE)
    torch.testing.assert_close(
        triton_fused.rms_norm(x, weight, 1e-6),
        norms.rms_norm(x, weight, 1e-6),
        rtol=TOLERANCE[HALF],
        atol=TOLERANCE[HALF],
    )


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("rotary_dim", "factor"), [(None, 1.0), (12, 1.3)])
def test_rope_and_write_kv(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    rotary_dim: int | None,
    factor: float,
) -> None:
    torch.manual_seed(0)
    tokens, num_blocks, block_size = 5, 3, 4
    kv_shape = (2, num_blocks, num_kv_heads, block_size, head_dim)
    qkv = torch.randn(tokens, num_heads + 2 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    cache = torch.randn(kv_shape, device=DEVICE).to(dtype)
    positions = torch.tensor([0, 1, 7, 100, 2047], device=DEVICE)
    slots = torch.tensor([11, 0, 5, 6, -1], device=DEVICE)
    rotary_dim = rotary_dim or head_dim
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, rotary_dim, 2, device=DEVICE) / rotary_dim)
    expected_cache, expected_qkv = cache.clone(), qkv.clone()
    cos, sin = rope_cos_sin(positions, inv_freq, dtype, factor)
    kept = slots >= 0
    rotated = expected_qkv[kept]
    kv_write.rope_and_write_kv(
        rotated,
        cos[kept],
        sin[kept],
        expected_cache,
        kv_write.slot_rows_for(slots[kept] // block_size, slots[kept] % block_size, kv_shape),
    )
    triton_fused.rope_and_write_kv(qkv, positions.int(), inv_freq, cache, slots.int(), factor)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": max(TOLERANCE[dtype], 2e-4)}
    torch.testing.assert_close(qkv[kept][:, :num_heads], rotated[:, :num_heads], **tolerance)
    torch.testing.assert_close(cache, expected_cache, **tolerance)
