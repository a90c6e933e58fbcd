"""The benchmark's own websocket client reads what a real server sends."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.server import serve

from openlora.bench.pipeline_client import run_plan
from openlora.bench.pipeline_plan import WINDOW_OPEN, ClientPlan, percentile
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
        usage = {"completion_tokens": request["params"]["max_tokens"]}
        await websocket.send(json.dumps({"type": "done", "timings": timings, "usage": usage}))


async def answer_with_a_gap(websocket):
    async for _ in websocket:
        for index in (0, 2):
            await websocket.send(json.dumps({"type": "token", "token_id": 1, "index": index}))


async def answer_short(websocket):
    async for _ in websocket:
        done = {"type": "done", "timings": {}, "usage": {"completion_tokens": 1}}
        await websocket.send(json.dumps(done))


async def say_nothing(websocket):
    await websocket.wait_closed()


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
    result = run(answer, streams=5, tokens=20)
    assert (result.tokens, result.requests, result.errors) == (100, 5, [])
    assert result.latency.count == 100
    assert 0 <= result.latency.p50_ms <= result.latency.p99_ms < 3000
    assert result.added_ttft.count == 5


def test_in_a_steady_state_streams_ask_again_and_the_ramp_is_not_counted(capsysbinary):
    result = run(answer, streams=5, tokens=20, ramp_s=0.2, window_s=0.5)
    assert capsysbinary.readouterr().out == WINDOW_OPEN
    assert result.seconds >= 0.5
    assert result.requests > 5
    assert 20 * result.requests <= result.tokens <= 20 * (result.requests + 2 * 5)
    assert result.errors == []


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (refuse, "no such thing"),
        (answer_with_a_gap, "token 2 came in place of 1"),
        (answer_short, "0 tokens came of _Usage(completion_tokens=1)"),
    ],
)
def test_what_is_wrong_ends_the_stream_and_is_reported(handler, error):
    result = run(handler, streams=2, tokens=5)
    assert result.errors == [error] * 2


def test_the_client_gives_up_in_time():
    result = run(say_nothing, streams=2, tokens=5, limit_s=0.3)
    assert result.errors == ["2 of 2 streams had not ended after 0.3 s; 0 tokens had come"]


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(OSError, match="onnect"):
        asyncio.run(run_plan(ClientPlan("ws://127.0.0.1:1/", False, 1, 1)))
