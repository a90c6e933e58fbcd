"""Norms, activation, linear, rotary embedding and KV write against plain formulas."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels.activation import silu_and_mul
from openlora.kernels.kv_write import rope_and_write_kv, slot_rows_for
from openlora.kernels.linear import Linear
from openlora.kernels.norms import add_rms_norm, rms_norm
from openlora.kernels.rope import RopeScaling, inverse_frequencies, rope_cos_sin

ROWS = [0, 1, 15, 16, 17, 63, 64, 65]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(actual, expected, dtype=torch.float32):
    torch.testing.assert_close(
        actual.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_and_residual(rows, dtype):
    x, residual = torch.randn(2, rows, 24).to(dtype)
    weight = torch.rand(24).to(dtype)

    def formula(v):
        v = v.float()
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.float()

    close(rms_norm(x, weight, 1e-5), formula(x), dtype)
    total = x + residual
    close(add_rms_norm(x, residual, weight, 1e-5), formula(total), dtype)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_and_mul(rows, dtype):
    gate_up = torch.randn(rows, 48).to(dtype)
    before = gate_up.clone()
    gate, up = gate_up.float().chunk(2, -1)
    close(silu_and_mul(gate_up), gate * torch.sigmoid(gate) * up, dtype)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_packed_or_not(rows, dtype):
    weight = (torch.randn(40, 24) / 5).to(dtype)
    x = torch.randn(rows, 24).to(dtype)
    want = x.float() @ weight.float().T
    linear = Linear(weight.clone())
    assert (linear.out_features, linear.in_features) == (40, 24)
    close(linear(x), want, dtype)


@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rope_and_write_kv(tokens, dtype):
    heads, kv_heads, head_dim, block_size, num_blocks = 6, 2, 8, 16, 8
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    original = qkv.clone()
    positions = torch.randint(0, 1000, (tokens,))
    inv_freq = inverse_frequencies(head_dim, 10000.0, None)
    slots = torch.randperm(num_blocks * block_size)[:tokens]
    cache = torch.full((2, num_blocks, kv_heads, block_size, head_dim), 7.0).to(dtype)
    rows = slot_rows_for(slots // block_size, slots % block_size, cache.shape)
    rope_and_write_kv(qkv, *rope_cos_sin(positions, inv_freq, dtype), cache, rows)

    written = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for token in range(tokens):
        want = original[token].float().clone()
        for head in range(heads + kv_heads):
            for i in range(head_dim // 2):
                angle = float(positions[token]) * float(inv_freq[i])
                a, b = original[token, head, i].float(), original[token, head, i + 4].float()
                cos, sin = torch.tensor(angle).cos(), torch.tensor(angle).sin()
                want[head, i], want[head, i + 4] = a * cos - b * sin, b * cos + a * sin
        block, offset = divmod(int(slots[token]), block_size)
        written[block, offset] = True
        # fp32 angles near 1000 carry about 1e-4 of error.
        torch.testing.assert_close(
            qkv[token].float(), want, atol=max(5e-4, TOLERANCE[dtype]), rtol=2e-2
        )
        assert torch.equal(cache[0, block, :, offset], qkv[token, heads : heads + kv_heads])
        assert torch.equal(cache[1, block, :, offset], original[token, heads + kv_heads :])
    untouched = cache.transpose(2, 3)[:, ~written]
    assert (untouched == 7.0).all()


def test_llama3_scaling_keeps_short_and_divides_long_wavelengths():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    plain = inverse_frequencies(128, 500000.0, None)
    scaled = inverse_frequencies(128, 500000.0, scaling)
    wavelength = 2 * torch.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert ((scaled > plain / 8) & (scaled < plain))[between].all()


def test_linear_scaling():
    scaled = inverse_frequencies(8, 10000.0, RopeScaling("linear", 4.0))
    torch.testing.assert_close(scaled, inverse_frequencies(8, 10000.0, None) / 4)
