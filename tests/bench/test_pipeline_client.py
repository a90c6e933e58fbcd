"""The benchmark's own websocket client reads what a real server sends."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.server import serve

from openlora.bench.pipeline_client import ClientPlan, percentile, run_plan
from workers.scripted_engine import clock_token


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_one_of_the_values_and_rises(values, share):
    assert percentile(values, share) in values
    assert percentile(values, share) <= percentile(values, 1.0) == max(values)


async def answer(websocket):
    """One request after the other, as the gateway would; a large frame and a ping in between."""
    async for text in websocket:
        request = json.loads(text)
        await websocket.send(json.dumps({"type": "accepted", "pad": "x" * 70_000}))
        for index in range(request["params"]["max_tokens"]):
            token_id = clock_token(time.monotonic_ns())
            await websocket.send(
                json.dumps({"type": "token", "token_id": token_id, "index": index})
            )
        await (await websocket.ping())
        timings = {"queue_ms": 1.0, "ttft_ms": 2.0}
        await websocket.send(json.dumps({"type": "done", "timings": timings}))


async def refuse(websocket):
    async for _ in websocket:
        await websocket.send(json.dumps({"type": "error", "message": "no such thing"}))


def run(handler, **fields):
    async def main():
        # run_plan leaves its connections to the end of its process
        listener = serve(handler, "127.0.0.1", 0, subprotocols=["openlora.v1"], close_timeout=0.1)
        async with listener as server:
            port = server.sockets[0].getsockname()[1]
            plan = ClientPlan(f"ws://127.0.0.1:{port}/", relay=False, **fields)
            return await asyncio.wait_for(run_plan(plan), 20)

    return asyncio.run(main())


def test_every_token_of_every_request_is_counted_and_timed():
    result = run(answer, streams=5, requests=3, tokens=20)
    assert (result.tokens, result.errors) == (300, [])
    assert result.latency.count == 300
    assert 0 <= result.latency.p50_ms <= result.latency.p99_ms < 3000
    assert result.added_ttft.count == 15


def test_staggered_first_requests_are_not_measured():
    result = run(answer, streams=5, requests=3, tokens=20, stagger=True)
    assert result.latency.count == 5 * 2 * 20
    assert result.added_ttft.count == 10


def test_an_error_frame_ends_the_stream_and_is_reported():
    result = run(refuse, streams=2, requests=1, tokens=5)
    assert result.errors == ["no such thing"] * 2


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(OSError, match="onnect"):
        asyncio.run(run_plan(ClientPlan("ws://127.0.0.1:1/", False, 1, 1, 1)))
