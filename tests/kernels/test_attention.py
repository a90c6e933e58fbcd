"""Paged attention against a loop over tokens and heads, on context lengths around block edges."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels.attention import paged_attention, plan_attention

BLOCK = 16
HEAD_DIM = 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def run(
    query_lens,
    context_lens,
    *,
    num_heads=6,
    num_kv_heads=2,
    dtype=torch.float32,
    stale=0.0,
    window=0,
    soft_cap=0.0,
):
    """Result and fp32 reference; cache positions that no sequence has hold ``stale``."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-length // BLOCK) for length in context_lens]
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables, at = [], 0
    for count in needed:
        tables.append(order[at : at + count])
        at += count
    cache = torch.full((2, len(order), num_kv_heads, BLOCK, HEAD_DIM), stale)
    for table, length in zip(tables, context_lens, strict=True):
        for position in range(length):
            cache[:, table[position // BLOCK], :, position % BLOCK] = torch.randn(
                2, num_kv_heads, HEAD_DIM, generator=generator
            )
    cache = cache.to(dtype)
    q = torch.randn(sum(query_lens), num_heads, HEAD_DIM, generator=generator).to(dtype)
    plan = plan_attention(query_lens, context_lens, tables, cache, window)
    out = paged_attention(q, cache, plan, HEAD_DIM**-0.5, soft_cap)
    assert out.shape == (sum(query_lens), num_heads * HEAD_DIM)
    return out.float(), reference(q, cache, query_lens, context_lens, tables, window, soft_cap)


def reference(q, cache, query_lens, context_lens, tables, window, soft_cap):
    out = torch.zeros(q.shape[0], q.shape[1], q.shape[2])
    per_kv_head = q.shape[1] // cache.shape[2]
    token = 0
    for query_len, context_len, table in zip(query_lens, context_lens, tables, strict=True):
        for offset in range(query_len):
            end = context_len - query_len + offset + 1
            visible = range(max(end - window, 0) if window else 0, end)
            for head in range(q.shape[1]):
                kv = torch.stack(
                    [cache[:, table[p // BLOCK], head // per_kv_head, p % BLOCK] for p in visible],
                    dim=1,
                ).float()
                scores = kv[0] @ q[token, head].float() * q.shape[2] ** -0.5
                if soft_cap:
                    scores = soft_cap * (scores / soft_cap).tanh()
                out[token, head] = scores.softmax(0) @ kv[1]
            token += 1
    return out.flatten(1)


@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 32, 33, 65])
def test_decode_at_block_edges(context):
    torch.testing.assert_close(*run([1], [context]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("query", [2, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("cached", [0, 1, 16, 30])
def test_prefill_chunks(query, cached):
    torch.testing.assert_close(*run([query], [cached + query]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_mixed_batch_and_grouped_queries(dtype, num_heads, num_kv_heads):
    out, want = run(
        [1, 1, 1, 5, 17],
        [1, 40, 17, 5, 33],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
    )
    torch.testing.assert_close(out, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


LENS = [
    ([1, 1, 1, 5, 17, 40], [1, 40, 17, 5, 33, 40]),
    ([1, 1, 1], [3, 200, 40]),
    ([30, 2], [30, 70]),
]


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("window", [1, 4, 15, 16, 17, 32, 33, 1000])
def test_a_window_ends_with_the_query_itself(lens, window):
    out, want = run(*lens, window=window, stale=float("nan"))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores_are_capped_before_the_softmax(lens, window, dtype):
    out, want = run(*lens, window=window, soft_cap=0.5, dtype=dtype, stale=float("nan"))
    torch.testing.assert_close(out, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    if dtype is torch.float32:
        assert not torch.allclose(out, run(*lens, window=window)[0], atol=1e-3)


def test_contexts_of_very_different_length_are_grouped_apart():
    lens = [3, 400, 20, 150, 390]
    out, want = run([1] * 5, lens)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lens", [([1, 1, 1], [3, 17, 40]), ([1, 4, 18], [20, 4, 30])])
def test_stale_cache_content_is_never_read(lens):
    out, want = run(*lens, stale=float("nan"))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_no_tokens():
    out, _ = run([], [])
    assert out.shape[0] == 0
