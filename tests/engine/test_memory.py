"""Pool sizes: what is asked for exactly, what is left open, and what does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.engine import EngineConfig
from openlora.engine.memory import (
    CPU_ADAPTER_CACHE_BYTES,
    CPU_KV_CACHE_BYTES,
    CUDA_RESERVE_BYTES,
    check_context,
    check_weights,
    plan_memory,
    usable_bytes,
)
from openlora.errors import SetupError

MIB = 1 << 20
GIB = 1 << 30
PAGES = (4 * MIB, MIB, 3 * MIB, 2 * MIB)
"""10 MiB for one of each."""


def plan(usable, device="cuda", *, page_bytes=PAGES, block_bytes=MIB, **settings):
    return plan_memory(
        EngineConfig("m", **settings),
        device,
        page_bytes=page_bytes,
        block_bytes=block_bytes,
        usable=usable,
    )


def test_what_is_left_open_shares_the_memory():
    assert plan(1000 * MIB).num_pages == (20,) * 4
    assert plan(1000 * MIB).num_blocks == 800
    on_cpu = plan(100 * GIB, "cpu")
    assert on_cpu.num_pages[0] == CPU_ADAPTER_CACHE_BYTES // (10 * MIB)
    assert on_cpu.num_blocks == CPU_KV_CACHE_BYTES // MIB
    small_host = plan(100 * MIB, "cpu")
    assert small_host.num_pages == (2,) * 4
    assert small_host.num_blocks == 80


def test_what_is_given_is_taken():
    both = plan(1000 * MIB, adapter_pages=(1, 2, 0, 4), num_kv_blocks=7)
    assert (both.num_pages, both.num_blocks) == ((1, 2, 0, 4), 7)
    budgets = plan(1000 * MIB, adapter_cache_bytes=39 * MIB, kv_cache_bytes=12 * MIB + 5)
    assert (budgets.num_pages, budgets.num_blocks) == ((3,) * 4, 12)
    pages_open = plan(100 * MIB, num_kv_blocks=95)
    assert (pages_open.num_pages, pages_open.num_blocks) == ((0,) * 4, 95)
    blocks_open = plan(100 * MIB, adapter_pages=(0, 0, 0, 0))
    assert blocks_open.num_blocks == 100


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"adapter_pages": (64, 64, 64, 64), "num_kv_blocks": 50},
            "64 pages of each site of adapters take 640.0 MiB and 50 KV blocks take 50.0 MiB, but "
            "100.0 MiB are usable on cuda beside the weights; 5 pages of each site or 0 KV blocks "
            "would fit beside the other: lower adapter_pages or num_kv_blocks",
        ),
        (
            {"adapter_pages": (64, 0, 0, 2)},
            "64 + 0 + 0 + 2 pages of adapters take 260.0 MiB, but 100.0 MiB are usable on cuda "
            "beside the weights; 10 pages of each site would fit: lower adapter_pages",
        ),
        (
            {"kv_cache_bytes": 3 * GIB},
            "3072 KV blocks take 3.0 GiB, but 100.0 MiB are usable on cuda beside the weights; "
            "100 KV blocks would fit: lower kv_cache_bytes",
        ),
        ({"adapter_cache_bytes": 100 * MIB}, "not one KV block of 16 tokens (1.0 MiB) fits"),
        ({"kv_cache_bytes": 5}, "not one KV block"),
    ],
)
def test_what_does_not_fit_is_said_with_what_would(settings, says):
    with pytest.raises(SetupError) as raised:
        plan(100 * MIB, **settings)
    assert says in raised.value.message


@given(
    usable=st.integers(0, 4000),
    device=st.sampled_from(["cpu", "cuda"]),
    page_bytes=st.tuples(*[st.integers(1, 40)] * 4),
    block_bytes=st.integers(1, 100),
    pages=st.none() | st.integers(0, 50),
    blocks=st.none() | st.integers(1, 50),
)
def test_a_plan_never_takes_more_than_there_is(
    usable, device, page_bytes, block_bytes, pages, blocks
):
    settings = {
        "adapter_pages": None if pages is None else (pages,) * 4,
        "num_kv_blocks": blocks,
    }
    least = (pages or 0) * sum(page_bytes) + (blocks or 1) * block_bytes
    try:
        made = plan(usable, device, page_bytes=page_bytes, block_bytes=block_bytes, **settings)
    except SetupError:
        # With room for what was asked for, only a share for adapters can be in the way.
        assert least > usable or (pages is None and least > usable * 0.8)
        return
    taken = sum(map(int.__mul__, made.num_pages, page_bytes)) + made.num_blocks * block_bytes
    assert taken <= usable
    assert made.num_blocks >= 1
    assert pages is None or made.num_pages == (pages,) * 4
    assert blocks is None or made.num_blocks == blocks


def test_usable_counts_from_the_whole_gpu_and_from_what_a_host_has_free():
    config = EngineConfig("m", memory_fraction=0.75)
    assert usable_bytes(config, "cuda", 70 * GIB, 80 * GIB) == 50 * GIB - CUDA_RESERVE_BYTES
    assert usable_bytes(config, "cuda", 10 * GIB, 80 * GIB) == 0
    assert usable_bytes(config, "cpu", 8 * GIB, 8 * GIB) == 6 * GIB


def test_weights_that_do_not_fit_are_refused_with_both_sizes():
    check_weights(EngineConfig("m"), "cpu", 5 * GIB, 5 * GIB)
    with pytest.raises(SetupError, match=r"weights of m take 16\.0 GiB and 5\.0 GiB are usable"):
        check_weights(EngineConfig("m"), "cuda", 16 * GIB, 5 * GIB)


def test_a_context_that_the_cache_cannot_hold_is_refused():
    check_context(EngineConfig("m", max_model_len=48), 3, 1000)
    check_context(EngineConfig("m"), 3, 1000)
    with pytest.raises(SetupError, match=r"49, but the KV cache holds 48 .* 4 blocks .* 4000\)"):
        check_context(EngineConfig("m", max_model_len=49), 3, 1000)
