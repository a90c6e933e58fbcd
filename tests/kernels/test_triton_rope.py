"""The Triton rotary embedding with KV write against the torch reference it stands in for."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels import kv_write, triton_rope
from openlora.kernels.rope import rope_cos_sin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter knows no bfloat16 arithmetic.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
TOLERANCE = {torch.float32: 1e-5, HALF: 2e-2}


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
    triton_rope.rope_and_write_kv(qkv, positions.int(), inv_freq, cache, slots.int(), factor)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": max(TOLERANCE[dtype], 2e-4)}
    torch.testing.assert_close(qkv[kept][:, :num_heads], rotated[:, :num_heads], **tolerance)
    torch.testing.assert_close(cache, expected_cache, **tolerance)
