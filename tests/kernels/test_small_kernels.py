"""Norms, activation, linear, rotary embedding and KV write against plain formulas."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from openlora.kernels.kv_write import rope_and_write_kv, slot_rows_for
from openlora.kernels.linear import Linear
from openlora.kernels.norms import add_rms_norm, norm_heads, rms_norm
from openlora.kernels.rope import rope_cos_sin

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
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
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


def test_a_part_of_each_head_is_rotated_as_if_it_were_all():
    heads, kv_heads, head_dim, rotary_dim = 3, 1, 12, 8
    qkv = torch.randn(5, heads + 2 * kv_heads, head_dim)
    original = qkv.clone()
    cos, sin = rope_cos_sin(torch.arange(5), torch.rand(rotary_dim // 2), torch.float32)
    narrow = original[..., :rotary_dim].contiguous()
    rows = slot_rows_for(torch.zeros(5, dtype=torch.int64), torch.arange(5), (2, 1, 1, 16, 12))
    cache = torch.zeros(2, 1, kv_heads, 16, head_dim)
    rope_and_write_kv(qkv, cos, sin, cache, rows)
    rope_and_write_kv(narrow, cos, sin, torch.zeros(2, 1, kv_heads, 16, rotary_dim), rows)
    close(qkv[..., :rotary_dim], narrow)
    assert torch.equal(qkv[..., rotary_dim:], original[..., rotary_dim:])
    assert torch.equal(cache[0, 0, 0, :5], qkv[:, heads])


def test_the_attention_factor_scales_cos_and_sin():
    positions, inv_freq = torch.arange(7), torch.rand(4)
    plain = rope_cos_sin(positions, inv_freq, torch.float32)
    for scaled, whole in zip(
        rope_cos_sin(positions, inv_freq, torch.float32, 1.25), plain, strict=True
    ):
        close(scaled, whole * 1.25)


def test_a_norm_weight_in_fp32_is_multiplied_before_rounding():
    x, weight = torch.randn(9, 24).bfloat16(), 1 + torch.randn(24) * 1e-3
    want = x.float() * x.float().square().mean(-1, keepdim=True).add(1e-5).rsqrt() * weight
    got = rms_norm(x, weight, 1e-5)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_heads_norms_q_and_k_and_leaves_v(tokens, dtype):
    qkv = torch.randn(tokens, 4 + 2 * 2, 16).to(dtype)
    original = qkv.clone()
    q_norm, k_norm = torch.rand(2, 16).to(dtype)
    norm_heads(qkv, q_norm, k_norm, 2, 1e-6)
    for head in range(6):
        weight = q_norm if head < 4 else k_norm
        close(qkv[:, head], rms_norm(original[:, head], weight, 1e-6), dtype)
    assert torch.equal(qkv[:, 6:], original[:, 6:])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gelu_tanh_and_mul(rows, dtype):
    gate_up = torch.randn(rows, 48).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=-1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    close(gelu_tanh_and_mul(gate_up), 0.5 * gate * (1 + inner.tanh()) * up, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_linear_adds_its_bias(dtype):
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(5, 24)
    linear = Linear(weight.to(dtype), bias.to(dtype))
    want = x.to(dtype).float() @ weight.to(dtype).float().T + bias.to(dtype).float()
    torch.testing.assert_close(
        linear(x.to(dtype)).float(), want, atol=10 * TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
