"""More is asked for than can be served: who is refused, and that all others are served in turn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field

import pytest
from websockets.asyncio.client import connect

from openlora.engine.fair_line import IN_A_ROW
from openlora.local import free_port
from tests.integration.up_system import UpSystem, write_adapters, write_model

pytestmark = [pytest.mark.services, pytest.mark.long, pytest.mark.timeout(300)]

FLOOD = 600
ALLOWED = 450
"""Jobs of a tenant under way; of an adapter more, so that it is the tenant that is refused."""
MAX_WAIT_S = 2.0
AT_ONCE = 200
"""Requests on one connection, which takes 256."""
SEATS = 64
LONG = 200
CROWD = 12
OFFER_TURNS = 120


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("overload")
    model = write_model(root / "model")
    return ("--model", str(model), "--adapters", str(write_adapters(model, root / "adapters")))


def started(files, folder, monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    system = UpSystem(folder, free_port(), *files)
    system.wait_ready()
    return system


@pytest.fixture(scope="module")
def shared(files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        system = started(
            files,
            tmp_path_factory.mktemp("shared"),
            patch,
            OPENLORA_API_KEYS="greedy:key-of-greedy,modest:key-of-modest",
            OPENLORA_MAX_TENANT_JOBS=str(ALLOWED),
        )
    yield system
    system.stop()


@dataclass
class Asked:
    """One request: when it was sent and accepted, when it spoke first, and its last frame."""

    at: float
    accepted: float = 0.0
    spoke: float = 0.0
    over: float = 0.0
    last: dict = field(default_factory=dict)

    @property
    def is_refused(self) -> bool:
        return self.last.get("code") == "overloaded"


class Connection:
    """Sends requests, and writes down what becomes of each."""

    def __init__(self, socket):
        self.socket = socket
        self.asked: dict[str, Asked] = {}
        self.reader = asyncio.create_task(self.read())

    async def ask(self, count, **fields):
        for _ in range(count):
            name = f"r{len(self.asked)}"
            self.asked[name] = Asked(time.monotonic())
            await self.socket.send(json.dumps({"type": "generate", "request_id": name, **fields}))

    async def read(self):
        async for text in self.socket:
            frame, now = json.loads(text), time.monotonic()
            asked = self.asked[frame["request_id"]]
            if frame["type"] == "accepted":
                asked.accepted = now
            elif frame["type"] == "token":
                asked.spoke = asked.spoke or now
            else:
                asked.over, asked.last = now, frame

    async def until(self, is_true, timeout_s=120.0):
        deadline = time.monotonic() + timeout_s
        while not is_true():
            assert not self.reader.done(), self.reader
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    def count_over(self):
        return sum(bool(asked.over) for asked in self.asked.values())


def connecting(system, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = system.url.replace("http", "ws") + "/v1/ws"
    return connect(url, additional_headers=headers, max_size=None, max_queue=None)


def a_request(tokens=64, **fields):
    params = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {"prompt": "the sea", "params": params, **fields}


async def flood(sockets, count, **fields):
    """``count`` requests over all of them, and wait until each was accepted or refused."""
    connections = [Connection(socket) for socket in sockets]
    share = count // len(connections)
    await asyncio.gather(*(c.ask(share, **a_request(**fields)) for c in connections))
    for connection in connections:
        asked = connection.asked.values()
        await connection.until(lambda asked=asked: all(a.accepted or a.over for a in asked))
    return connections


async def behind_a_flood(system, key, mine, *, flooder, count=FLOOD, **others):
    """A request of ``key`` behind a flood of ``others``: how many of it are answered until the
    request is, how many were left then, and the flood in the end."""
    async with (
        connecting(system, flooder) as one,
        connecting(system, flooder) as two,
        connecting(system, flooder) as three,
        connecting(system, key) as quiet,
    ):
        flooding = await flood((one, two, three), count, tokens=LONG, **others)

        def count_over():
            return sum(connection.count_over() for connection in flooding)

        asking = Connection(quiet)
        before = count_over()
        await asking.ask(1, **a_request(**mine))
        await asking.until(lambda: asking.count_over() == 1)
        passed = count_over() - before
        for connection in flooding:
            await connection.until(lambda c=connection: c.count_over() == len(c.asked))
        (asked,) = asking.asked.values()
        assert asked.last["type"] == "done", asked.last
        asked = [a for connection in flooding for a in connection.asked.values()]
        return passed, len(asked) - before - passed, asked


def test_a_tenant_s_flood_is_refused_beyond_its_part_and_keeps_no_other_waiting(shared):
    passed, left, flooding = asyncio.run(
        behind_a_flood(shared, "key-of-modest", {}, flooder="key-of-greedy")
    )
    refused = [asked for asked in flooding if asked.is_refused]
    assert refused
    assert all(asked.last["retry_after_ms"] > 0 for asked in refused)
    served = [asked for asked in flooding if not asked.is_refused]
    assert all(asked.last["type"] == "done" for asked in served)
    # Those that had seats, and those that took them while it was answered.
    assert passed <= 2 * SEATS < left


def test_a_flood_of_one_adapter_keeps_another_of_the_same_tenant_waiting_for_its_turn(shared):
    mine = {"adapter": "poet"}
    ask = behind_a_flood(
        shared, "key-of-modest", mine, flooder="key-of-modest", count=ALLOWED - 30, adapter="pirate"
    )
    passed, left, flooding = asyncio.run(ask)
    served = [asked for asked in flooding if not asked.is_refused]
    assert all(asked.last["type"] == "done" for asked in served)
    assert passed <= 2 * SEATS + IN_A_ROW
    assert left > passed


def test_what_cannot_be_served_in_time_is_refused_and_the_rest_is_served_in_time(
    files, tmp_path, monkeypatch
):
    system = started(files, tmp_path, monkeypatch, OPENLORA_MAX_WAIT_S=str(MAX_WAIT_S))

    async def offer_too_much():
        async with contextlib.AsyncExitStack() as stack:
            crowd = [
                Connection(await stack.enter_async_context(connecting(system)))
                for _ in range(CROWD)
            ]
            began = time.monotonic()
            await crowd[0].ask(AT_ONCE, **a_request())
            await crowd[0].until(lambda: crowd[0].count_over() == AT_ONCE)
            per_second = AT_ONCE / (time.monotonic() - began)
            crowd[0].asked.clear()
            began = time.monotonic()
            for turn in range(OFFER_TURNS):  # four times what it can
                await crowd[turn % CROWD].ask(int(0.4 * per_second) + 1, **a_request())
                await asyncio.sleep(max(0.0, began + 0.1 * turn - time.monotonic()))
            for one in crowd:
                await one.until(lambda one=one: one.count_over() == len(one.asked))
        return [asked for one in crowd for asked in one.asked.values()]

    try:
        asked = asyncio.run(offer_too_much())
    finally:
        system.stop()
    refused = [a for a in asked if a.is_refused]
    served = [a for a in asked if not a.is_refused]
    waits = sorted(a.spoke - a.accepted for a in served)
    assert len(refused) > len(served)
    assert all(0 < a.last["retry_after_ms"] <= 30_000 for a in refused)
    assert all(a.last["type"] == "done" for a in served)
    # The limit, and what a crowd can get in before heartbeats tell of it.
    assert waits[len(waits) // 2] < 2 * MAX_WAIT_S
    assert waits[-1] < 5 * MAX_WAIT_S
