"""`bench serve`: a plan of requests, a real gateway that answers it, and one that does not."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
from websockets.asyncio.server import serve

from openlora.bench import serve as bench
from openlora.bench.__main__ import main
from openlora.bench.serve_plan import Seen, make_plan
from openlora.commands.config import ClientConfig
from openlora.errors import SetupError
from openlora.local import free_port
from tests.conftest import Broker
from tests.gateway.running import ScriptedWorker, running_gateway


def test_the_same_seed_asks_the_same_and_no_two_prompts_begin_alike() -> None:
    settings = ([None, "a", "b", "c"], "zipf", 50.0, 90)
    plan = make_plan(2000, *settings, seed=3)
    assert plan == make_plan(2000, *settings, seed=3)
    assert {len(planned.prompt) for planned in plan} == {90}
    assert len({planned.prompt.partition(":")[0] for planned in plan}) == 2000
    counts = Counter(planned.adapter for planned in plan)
    assert counts[None] > counts["a"] > counts["c"] > 0
    times = [planned.at_s for planned in plan]
    assert times == sorted(times)
    assert 35 < times[-1] < 45  # 2,000 at 50 a second
    assert {p.at_s for p in make_plan(5, [None], "uniform", None, 9, 0)} == {None}


@pytest.mark.services
def test_a_run_against_a_real_gateway(
    embedded_broker: Broker,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.jsonl"
    with (
        running_gateway(embedded_broker.bootstrap_servers, redis_url, tmp_path) as gateway,
        ScriptedWorker(redis_url) as worker,
    ):
        flags = "--streams 3 --requests 9 --prompt-chars 80 --out"
        argv = f"bench serve --url {gateway.url} {flags} {out}".split()
        for more in ([], ["--rate", "100", "--cold"]):
            monkeypatch.setattr("sys.argv", [*argv, *more])
            assert main() == 0
        assert len(worker.jobs) == 1 + 9 + 9  # the first run was warmed up
        monkeypatch.setattr("sys.argv", [*argv, "--adapters", "nobody"])
        assert main() == 1
        assert "the system serves base" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["rate"] for row in rows] == [None, 100]
    for row in rows:
        assert (row["case"], row["requests"], row["failed"], row["adapters"]) == ("serve", 9, 0, 1)
        plan = make_plan(9, [None], "uniform", None, 80, 0)
        words = sum(len(p.prompt.split(" ")) for p in plan)  # which the script answers with
        assert row["out_tok_s"] * row["seconds"] == pytest.approx(words, rel=0.01)
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"] <= row["total_ms_p99"]


def test_what_fails_is_counted_by_its_code_and_a_lost_connection_is_made_again() -> None:
    connections = 0

    async def answer(websocket) -> None:
        nonlocal connections
        connections += 1
        request = json.loads(await websocket.recv())
        if connections == 1:
            return  # closes in the middle
        await websocket.send(json.dumps({"type": "error", "code": "overloaded", "message": "no"}))
        async for _ in websocket:
            usage = {"prompt_tokens": 3, "completion_tokens": request["params"]["max_tokens"]}
            for index in range(2):
                await websocket.send(json.dumps({"type": "token", "index": index}))
            await websocket.send(json.dumps({"type": "done", "usage": usage}))

    async def ask() -> Seen:
        async with serve(answer, "127.0.0.1", 0, subprotocols=["openlora.v1"]) as server:
            port = server.sockets[0].getsockname()[1]
            plan = make_plan(4, [None], "uniform", None, 9, 0)
            config = ClientConfig(f"http://127.0.0.1:{port}", None)
            return await bench._ask_all(config, plan, 1, 2, lambda: None)

    seen = asyncio.run(ask())
    assert seen.errors == {"connection_lost": 1, "overloaded": 1}
    assert (len(seen.total_ms), len(seen.first_ms), len(seen.gap_ms)) == (2, 2, 2)
    assert (seen.output_tokens, seen.prompt_tokens) == (4, 6)


def test_no_system_is_one_clear_error() -> None:
    config = ClientConfig(f"http://127.0.0.1:{free_port()}", None)
    plan = make_plan(1, [None], "uniform", None, 9, 0)
    with pytest.raises(SetupError, match=r"http://127.0.0.1:\d+"):
        asyncio.run(bench._ask_all(config, plan, 1, 2, lambda: None))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streams", "0"], "--streams is 0; it must be at least 1"),
        (["--prompt-chars", "-1"], "--prompt-chars is -1"),
        (["--rate", "0"], "--rate is 0.0; it must be more than 0"),
    ],
)
def test_bad_numbers_are_named(flags: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(SetupError, match=message):
        bench.run(parser.parse_args(flags))
