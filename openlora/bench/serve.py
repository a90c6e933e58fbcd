"""A running system under the load of many clients, as they see it: tokens/s, first tokens, gaps.

  openlora bench serve
  openlora bench serve --streams 64 --requests 1024 --adapters pirate,haiku --popularity zipf
  openlora bench serve --url http://gateway:8000 --rate 20 --requests 600 --out rows.jsonl

It talks to a gateway (--url, OPENLORA_URL; the key is OPENLORA_API_KEY) over websockets, one for
each of --streams clients. A client asks again as soon as its answer is complete; with --rate
requests come at random moments instead, so many a second, and wait for a client that is free: their
first tokens count from the moment they came, so that a system that falls behind shows it.

Answers are greedy and of --output tokens whatever they say; no two prompts begin the same. The
first requests, one for each adapter, load what is not loaded and are not counted, but with --cold.
One JSON line, printed and appended to --out:
  {"case":"serve","streams":16,"requests":64,"failed":0,"adapters":5,"seconds":…,"out_tok_s":…,
   "requests_s":…,"prompt_tokens":…,"ttft_ms_p50":…,"ttft_ms_p99":…,"gap_ms_p50":…,"gap_ms_p99":…,…}
`gap_ms`: from one token of a stream to its next. The exit status is 1 where a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from openlora.bench.serve_plan import POPULARITIES, Planned, Seen, make_plan, row_of
from openlora.commands.config import (
    ClientConfig,
    add_client_arguments,
    client_config,
    process_environment,
)
from openlora.commands.http_client import HttpClient, unreachable
from openlora.errors import SetupError, UnknownAdapter

TIMEOUT_S = 300.0
"""Longest silence within an answer."""
_BASE = "base"
OnEnd = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add_client_arguments(parser)
    parser.add_argument("--streams", type=int, default=16, metavar="N", help="clients; default 16")
    parser.add_argument("--requests", type=int, metavar="N", help="default four for each client")
    parser.add_argument("--rate", type=float, metavar="R", help="requests a second, at random")
    parser.add_argument(
        "--adapters",
        metavar="ID,…",
        help=f"{_BASE!r} is the model itself; default: it and all that the system serves",
    )
    parser.add_argument("--popularity", choices=POPULARITIES, default="uniform")
    parser.add_argument("--prompt-chars", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--output", type=int, default=64, metavar="N", help="tokens; default 64")
    parser.add_argument("--cold", action="store_true", help="count the first loads too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the row to FILE")


def run(args: argparse.Namespace) -> int:
    """Ask, print the row; returns the exit status."""
    _check(args)
    config = client_config(args, process_environment())
    adapters = _adapters(config, args.adapters)
    requests = args.requests or 4 * args.streams
    plan = make_plan(requests, adapters, args.popularity, args.rate, args.prompt_chars, args.seed)
    if not args.cold:
        warm_up = [Planned(f"{name}: are you there?", name) for name in adapters]
        warmed = asyncio.run(_ask_all(config, warm_up, args.streams, 2, lambda: None))
        if warmed.errors:
            raise SetupError(f"the first requests failed: {dict(warmed.errors)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=requests)
        began = time.perf_counter()
        seen = asyncio.run(
            _ask_all(config, plan, args.streams, args.output, lambda: progress.advance(task))
        )
        seconds = time.perf_counter() - began
    row = row_of(args, config.url, len(adapters), requests, seconds, seen)
    line = msgspec.json.encode(row).decode()
    print(line)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    if seen.errors:
        print(f"openlora bench serve: {row.failed} requests failed", file=sys.stderr)
    return 1 if seen.errors else 0


async def _ask_all(
    config: ClientConfig, plan: Sequence[Planned], streams: int, output: int, on_end: OnEnd
) -> Seen:
    """Ask everything of ``plan`` with ``streams`` clients; ``on_end`` is called for each answer."""
    seen, waiting = Seen(), _coming(plan)
    turn = asyncio.Lock()

    async def client() -> None:
        socket = await _connected(config)
        while True:
            async with turn:
                due = await anext(waiting, None)
            if due is None:
                await socket.close()
                return
            planned, came = due
            try:
                await _ask(socket, planned, output, came, seen)
            except (OSError, WebSocketException):  # a TimeoutError is an OSError
                seen.errors["connection_lost"] += 1
                await socket.close()
                socket = await _connected(config)
            on_end()

    await asyncio.gather(*(client() for _ in range(min(streams, len(plan)))))
    return seen


async def _coming(plan: Sequence[Planned]) -> AsyncIterator[tuple[Planned, float | None]]:
    """The requests, each once it is due, with the moment at which it was."""
    began = time.perf_counter()
    for planned in plan:
        if planned.at_s is None:
            yield planned, None
            continue
        await asyncio.sleep(max(0.0, began + planned.at_s - time.perf_counter()))
        yield planned, began + planned.at_s


async def _ask(
    socket: ClientConnection, planned: Planned, output: int, came: float | None, seen: Seen
) -> None:
    """One request to its end; ``came``: when it was due, None: now."""
    request: dict[str, Any] = {
        "type": "generate",
        "request_id": "r",
        "prompt": planned.prompt,
        "params": {"max_tokens": output, "temperature": 0, "ignore_eos": True},
    }
    if planned.adapter is not None:
        request["adapter"] = planned.adapter
    sent = last = time.perf_counter() if came is None else came
    await socket.send(json.dumps(request))
    is_first = True
    while True:
        async with asyncio.timeout(TIMEOUT_S):
            frame = json.loads(await socket.recv())
        now = time.perf_counter()
        match frame["type"]:
            case "token":
                (seen.first_ms if is_first else seen.gap_ms).append((now - last) * 1e3)
                is_first, last = False, now
            case "done":
                seen.total_ms.append((now - sent) * 1e3)
                seen.output_tokens += frame["usage"]["completion_tokens"]
                seen.prompt_tokens += frame["usage"]["prompt_tokens"]
                return
            case "error":
                seen.errors[frame["code"]] += 1
                return


async def _connected(config: ClientConfig) -> ClientConnection:
    try:
        return await connect(
            config.websocket_url,
            subprotocols=[Subprotocol("openlora.v1")],
            additional_headers=config.headers,
            open_timeout=30,
        )
    except (OSError, WebSocketException) as error:
        raise unreachable(config.url, str(error)) from error


def _adapters(config: ClientConfig, names: str | None) -> list[str | None]:
    """What ``--adapters`` names; the base model is None."""
    known = [record["id"] for record in HttpClient(config).get("/v1/adapters")]
    if names is None:
        return [None, *known]
    chosen = [name for name in names.split(",") if name]
    missing = [name for name in chosen if name != _BASE and name.partition("@")[0] not in known]
    if missing or not chosen:
        served = ", ".join([_BASE, *known[:20], *(["…"] if len(known) > 20 else [])])
        raise UnknownAdapter(f"--adapters is {names!r}; the system serves {served}")
    return [None if name == _BASE else name for name in chosen]


def _check(args: argparse.Namespace) -> None:
    for name in ("streams", "requests", "prompt_chars", "output"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise SetupError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.rate is not None and not args.rate > 0:
        raise SetupError(f"--rate is {args.rate}; it must be more than 0 requests a second")
