"""Native norms, activations, rotary embedding, KV write, attention and greedy draw."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from openlora.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from openlora.kernels.attention import paged_attention, plan_attention
from openlora.kernels.kv_write import rope_and_write_kv, slot_rows_for
from openlora.kernels.native.library import TYPES, Kind, Step
from openlora.kernels.norms import norm_heads, rms_norm
from openlora.kernels.rope import rope_cos_sin
from openlora.kernels.sampling import greedy
from tests.kernels.native import TOLERANCE, close, run

pytestmark = pytest.mark.usefixtures("two_threads")

ROWS = [0, 1, 7, 8, 17]
DTYPES = list(TOLERANCE)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 24, 64, 577])
@pytest.mark.parametrize("rows", ROWS)
def test_norms(rows, columns, dtype):
    x, residual = torch.randn(2, rows, columns).to(dtype)
    for weight in (torch.rand(columns).to(dtype), torch.rand(columns)):
        number = TYPES[weight.dtype]
        y = torch.empty_like(x)
        run(Kind.NORM, dtype, (x, weight, y, None), (columns, number), (1e-5,), rows=rows)
        close(y, rms_norm(x, weight, 1e-5), dtype)
        total = residual.clone()
        run(Kind.NORM, dtype, (x, weight, y, total), (columns, number), (1e-5,), rows=rows)
        assert torch.equal(total, residual + x)
        close(y, rms_norm(total, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_norm_heads(head_dim, dtype):
    qkv = torch.randn(5, 6 + 2 * 2, head_dim).to(dtype)
    q_norm, k_norm = torch.rand(2, head_dim)
    want = qkv.clone()
    norm_heads(want, q_norm, k_norm, 2, 1e-6)
    run(Kind.NORM_HEADS, dtype, (qkv, q_norm, k_norm), (6, 2, head_dim, 0), (1e-6,), rows=5)
    close(qkv, want, dtype)
    assert torch.equal(qkv[:, 8:], want[:, 8:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 24, 96])
@pytest.mark.parametrize("rows", ROWS)
def test_gated(rows, columns, dtype):
    gate_up = torch.randn(rows, 2 * columns).mul(4).to(dtype)
    for activation, reference in enumerate((silu_and_mul, gelu_tanh_and_mul)):
        y = gate_up.new_empty(rows, columns)
        run(Kind.GATED, dtype, (gate_up, y), (columns, activation), rows=rows)
        close(y, reference(gate_up), dtype)


def test_gated_far_from_zero():
    gate_up = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, math.nan, 1e4] + [1.0] * 8])
    y = torch.empty(1, 8)
    run(Kind.GATED, torch.float32, (gate_up, y), (8, 0), rows=1)
    torch.testing.assert_close(y, silu_and_mul(gate_up), atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (24, 6), (64, 64), (128, 32)])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_rope_and_kv_write(tokens, head_dim, rotary_dim, dtype):
    heads, kv_heads, block_size, num_blocks = 6, 2, 5, 4
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    positions = torch.randint(0, 1000, (tokens,))
    inv_freq = 1 / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    slots = torch.randperm(num_blocks * block_size)[:tokens]
    cache = torch.full((2, num_blocks, kv_heads, block_size, head_dim), 7.0).to(dtype)
    want, want_cache = qkv.clone(), cache.clone()
    rows = slot_rows_for(slots // block_size, slots % block_size, cache.shape)
    rope_and_write_kv(want, *rope_cos_sin(positions, inv_freq, dtype), want_cache, rows)
    angles = positions[:, None] * inv_freq
    cos, sin, slots = angles.cos(), angles.sin(), slots.int()
    step = Step(rows=tokens, slots=slots.data_ptr())
    step.cos[1], step.sin[1] = cos.data_ptr(), sin.data_ptr()
    numbers = (heads, kv_heads, head_dim, rotary_dim, num_blocks, block_size, 1)
    run(Kind.ROPE, dtype, (qkv, cache), numbers, step=step)
    close(qkv, want, dtype)
    close(cache, want_cache, dtype)


def attend(context_lens, dtype, *, heads=6, kv_heads=2, dim=64, block=16, window=0, cap=0.0):
    """Native result and torch's; what no sequence has in the cache is NaN."""
    needed = [-(-length // block) for length in context_lens]
    order = torch.randperm(sum(needed) + 2).tolist()
    tables = []
    for count in needed:
        tables.append([order.pop() for _ in range(count)])
    cache = torch.full((2, sum(needed) + 2, kv_heads, block, dim), math.nan)
    for table, length in zip(tables, context_lens, strict=True):
        for position in range(length):
            place = (slice(None), table[position // block], slice(None), position % block)
            cache[place] = torch.randn(2, kv_heads, dim)
    cache = cache.to(dtype)
    rows = len(context_lens)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(dtype)
    plan = plan_attention([1] * rows, context_lens, tables, cache, window)
    want = paged_attention(qkv[:, :heads], cache, plan, dim**-0.5, cap)
    y = torch.empty(rows, heads * dim, dtype=dtype)
    width = max(needed)
    padded = int32([table + [0] * (width - len(table)) for table in tables])
    lens = int32(context_lens)
    step = Step(
        rows=rows,
        decode_rows=rows,
        context_lens=lens.data_ptr(),
        block_tables=padded.data_ptr(),
        table_width=width,
    )
    numbers = (heads, kv_heads, dim, cache.shape[1], block, window)
    run(Kind.ATTENTION, dtype, (qkv, cache, y), numbers, (dim**-0.5, cap), step=step)
    return y, want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "context_lens",
    [[1], [2, 15, 16, 17], [31, 32, 33, 63, 64, 65], [127, 128, 129, 300, 1]],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"dim": 8, "block": 5},
        {"dim": 24, "heads": 4, "kv_heads": 4, "block": 1},
        {"dim": 128, "heads": 8, "kv_heads": 1, "block": 32},
        {"dim": 96, "window": 20},
        {"dim": 64, "window": 64, "cap": 5.0},
    ],
    ids=str,
)
def test_attention(context_lens, shape, dtype):
    got, want = attend(context_lens, dtype, **shape)
    close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(dtype):
    table, tokens = torch.randn(10, 24).to(dtype), int32([3, 9, 0])
    y = torch.empty(3, 24, dtype=dtype)
    step = Step(rows=3, token_ids=tokens.data_ptr())
    run(Kind.EMBED, dtype, (table, y), (24,), (1.0,), step=step)
    assert torch.equal(y, F.embedding(tokens.long(), table))
    run(Kind.EMBED, dtype, (table, y), (24,), (4.5,), step=step)
    close(y, F.embedding(tokens.long(), table) * 4.5, dtype)
    x, before = torch.randn(3, 24).to(dtype), y.clone()
    run(Kind.ADD, dtype, (y, x), (24,), rows=3)
    assert torch.equal(y, before + x)
    wide = torch.randn(3, 5001).mul(40).to(dtype)
    want = (wide.float() / 30).tanh() * 30
    run(Kind.SOFT_CAP, dtype, (wide,), (5001,), (30.0,), rows=3)
    close(wide, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1000])
def test_greedy(vocab, dtype):
    logits = torch.randn(9, vocab).to(dtype)
    logits[1] = 2.0  # a tie of all
    logits[2, vocab // 2] = math.nan
    logits[3, vocab - 1] = math.inf
    logits[4] = -math.inf
    logits[5, 0] = -math.inf
    tokens = torch.empty(9, dtype=torch.int64)
    run(Kind.GREEDY, dtype, (logits, tokens), (vocab,), rows=9)
    assert tokens.tolist() == greedy(logits).tolist()
    assert tokens[1] == 0
    assert tokens[2:5].tolist() == [-1, -1, -1]
