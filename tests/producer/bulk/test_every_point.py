"""A batch from its making to its end, struck at every point where the producer touches the world.

Points are the disk (before and behind what makes a file be there, or go), Redis (before and behind
each command), the broker (before, amid and behind what is sent; the commit) and the task queue. At
one of them in each run the process is killed, or the call fails, or the process is held up there
until another one has done all that was left, or a part of it. Whatever the point, each line has its
one result.
"""

from __future__ import annotations

import dataclasses
import errno
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from kafka import TopicPartition
from kafka.errors import KafkaConnectionError

from openlora.errors import Overloaded
from openlora.protocol.bulk import BulkAnswer, BulkAnswers, decode_bulk_message
from openlora.protocol.codec import encode
from openlora.protocol.status import AdapterRecord
from producer.bulk import blocks
from producer.bulk.adapters_known import KnownAdapters
from producer.bulk.app import do_step
from producer.bulk.collector import Collector
from producer.bulk.records import STEP_LOST_MS, Step
from producer.bulk.sender import BundleSender
from producer.bulk.state import now_ms
from producer.bulk.steward import Steward
from tests.producer.bulk.stepwise import Producer

pytestmark = [pytest.mark.services, pytest.mark.long]

PARTITION = TopicPartition("openlora.results", 0)


class Killed(BaseException):
    """kill -9: nothing catches it, so nothing is cleared up."""


class World:
    """Counts points, and strikes at one of them."""

    def __init__(self, strike_at: int, error: str) -> None:
        self.strike_at = strike_at
        self.error = error
        self.points = 0
        self.ahead_ms = 0
        self.is_armed = False
        self.meanwhile: Callable[[], None] = lambda: None
        self.struck: str | None = None

    def point(self, kind: str, where: str) -> None:
        if not self.is_armed:
            return
        self.points += 1
        if self.points != self.strike_at:
            return
        self.struck = where
        if self.error == "killed":
            raise Killed
        if self.error in ("held up", "overtaken"):
            self.is_armed = False
            self.meanwhile()
            return
        errors: dict[str, Exception] = {
            "disk": OSError(errno.ENOSPC, "No space left on device"),
            "redis": redis.ConnectionError("gone"),
            "broker": Overloaded("no broker"),
            "commit": KafkaConnectionError("gone"),
            "queue": OSError("the task queue does not answer"),
        }
        raise errors[kind]

    def around(self, kind: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any, **kwargs: Any) -> Any:
            self.point(kind, f"before {name} {args[1:2]}")
            answer = call(*args, **kwargs)
            self.point(kind, f"behind {name} {args[1:2]}")
            return answer

        return struck


class Broker:
    """Both topics: what was sent, what workers answered, and how far it was collected."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lines: list[bytes] = []
        self.answers: list[bytes] = []
        self.committed = 0

    def send(self, bundles: list[tuple[bytes | None, bytes]]) -> None:
        self.world.point("broker", "before send")
        for _, value in bundles:
            self.lines.append(value)
            self.world.point("broker", "amid send")

    def work(self) -> None:
        """A worker answers what is there, each bundle in two parts."""
        for value in self.lines:
            message = decode_bulk_message(value)
            answers = [
                BulkAnswer(line.line, line.custom_id, f"to {line.prompt}", "stop", 2, 3)
                for line in message.lines
            ]
            for part in (answers[:1], answers[1:]):
                identity = message.batch_id, message.input_hash, message.group
                self.answers.append(encode(BulkAnswers(*identity, tuple(part))))
        self.lines.clear()


class Consumer:
    """What the collector needs of Kafka's, from the last commit on."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.position = broker.committed

    def fetch(self) -> dict[TopicPartition, list[Any]]:
        """At most three messages."""
        found = list(enumerate(self.broker.answers))[self.position : self.position + 3]
        self.position += len(found)
        messages: list[Any] = [
            SimpleNamespace(offset=n, value=value, timestamp=1) for n, value in found
        ]
        return {PARTITION: messages} if messages else {}

    def commit(self, offsets: dict[TopicPartition, Any]) -> None:
        self.broker.world.point("commit", "before commit")
        self.broker.committed = offsets[PARTITION].offset
        self.broker.world.point("commit", "behind commit")


class Life:
    """Producer processes, one after the other, over one Redis, store and broker."""

    def __init__(self, producer: Producer, world: World, broker: Broker) -> None:
        self.producer = producer
        self.world = world
        self.broker = broker
        self.queue: list[tuple[str, Step]] = []
        self.begin()

    def begin(self) -> None:
        """A new process: nothing in memory."""
        self.tools = dataclasses.replace(
            self.producer.tools,
            sender=cast(BundleSender, self.broker),
            adapters=KnownAdapters(self.producer.client),
        )
        self.steward = Steward(self.producer.states, self.producer.client, self.put)
        self.consumer = Consumer(self.broker)
        self.collector = Collector("", self.producer.states, self.producer.store)

    def put(self, batch_id: str, step: Step) -> None:
        self.world.point("queue", "before queueing")
        self.queue.append((batch_id, step))
        self.world.point("queue", "behind queueing")

    def turn(self, batch_id: str) -> None:
        """One step, then all else once. Where no step is queued, time passes."""
        self.world.ahead_ms = 0
        if self.queue:
            do_step(self.tools, self.steward, *self.queue[0])
            del self.queue[:1]  # acknowledged late
        else:
            self.world.ahead_ms = STEP_LOST_MS + 1
        self.steward.advance(batch_id)
        self.world.ahead_ms = 0
        self.broker.work()
        self.collector._hold(self.consumer.fetch())
        if self.collector._pending:
            self.collector._flush(self.consumer, threading.Event())

    def run_beside(self, batch_id: str) -> None:
        """Another process does all that is left or, where this one is only overtaken, what comes
        before the lines are published; and what this one has in its hands, too. To the other, one
        adapter is new, and one has another version."""
        for name in ("a", "new"):
            registry = self.producer.registry
            registry.put(AdapterRecord(name, 0, secrets.token_hex(32), 8, (), "", 1, "", 1))
        other = Life(self.producer, self.world, self.broker)
        other.queue = list(self.queue)
        if self.world.error == "held up":
            other.run(batch_id, None)
        while other.is_before_publishing(batch_id):
            other.turn(batch_id)

    def is_before_publishing(self, batch_id: str) -> bool:
        state = self.producer.states.get(batch_id)
        return state is not None and state.phase in ("reading", "planning")

    def run(self, batch_id: str, cancel_at: int | None) -> None:
        for turn in range(200):
            if turn == cancel_at:
                self.producer.states.end(batch_id, "cancelled")
            self.world.is_armed = self.world.struck is None
            try:
                self.turn(batch_id)
            except Killed:
                self.begin()
            except (OSError, Overloaded, redis.RedisError):
                pass  # the task or the steward tries again
            self.world.is_armed = False
            if batch_id not in self.producer.states.open_ids():
                return
        raise AssertionError(
            f"no end after {self.world.struck}: {self.producer.states.get(batch_id)}"
        )


@pytest.fixture
def struck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], World]]:
    """Puts points into the disk and Redis; they ask the world of the present run."""
    world: list[World] = []

    def ask(kind: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: world[-1].around(kind, name, call)(*args, **kwargs)

    def begin(strike_at: int, error: str) -> World:
        world.append(World(strike_at, error))
        return world[-1]

    begin(0, "")
    monkeypatch.setattr("producer.bulk.reading.CHUNK_LINES", 4)
    monkeypatch.setattr("producer.bulk.plan.UNIT_LINES", 3)
    monkeypatch.setattr("producer.bulk.collector._RETRY_S", 0.0)
    monkeypatch.setattr("producer.bulk.steward.now_ms", lambda: now_ms() + world[-1].ahead_ms)
    # A kill does not need what only a power failure does, and it takes most of the time.
    monkeypatch.setattr(blocks.os, "fsync", ask("disk", "fsync", lambda descriptor: None))
    monkeypatch.setattr(Path, "replace", ask("disk", "replace", Path.replace))
    monkeypatch.setattr(Path, "rename", ask("disk", "rename", Path.rename))
    monkeypatch.setattr(shutil, "rmtree", ask("disk", "rmtree", shutil.rmtree))
    for owner, name in (
        (redis.Redis, "execute_command"),
        (redis.client.Pipeline, "execute"),
    ):
        monkeypatch.setattr(owner, name, ask("redis", name, getattr(owner, name)))
    yield begin
    world.append(World(0, ""))


ADAPTERS = ("a", "new", "b")
INPUT = b"".join(
    b'{"prompt":"p%d","adapter":"%b","custom_id":"c%d","max_tokens":3}\n'
    % (n, ADAPTERS[n % 3].encode(), n % 9)
    for n in range(12)
).replace(b"p4", b'p4"')
"""Twelve lines in three pieces: 5 is broken, 10 and 12 say a custom_id again, and 2, 8 and 11 name
an adapter that is not there, or not there yet."""


@pytest.mark.parametrize("error", ["killed", "refused", "held up", "overtaken"])
@pytest.mark.parametrize(
    "cancel_at", [None, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (2, 7))]
)
def test_each_line_has_its_one_result(
    producer: Producer,
    struck: Callable[[int, str], World],
    error: str,
    cancel_at: int | None,
) -> None:
    for strike_at in count(1):
        for name in ("a", "new"):
            producer.registry.remove(name)
        producer.registry.put(AdapterRecord("a", 0, "a" * 64, 8, (), "", 1, "", 1))
        batch_id = producer.submit(INPUT)
        producer.queue.clear()
        producer.client.hset(f"openlora:{{{batch_id}}}:batch", mapping={"step": "", "step_ms": 0})
        world = struck(strike_at, error)
        life = Life(producer, world, Broker(world))
        world.meanwhile = partial(life.run_beside, batch_id)
        life.run(batch_id, cancel_at)
        where = f"{error} at {strike_at}: {world.struck}"
        state = producer.states.get(batch_id)
        assert state is not None
        assert state.phase == "over", where
        results = producer.results(batch_id)
        assert [result["line"] for result in results] == list(range(1, 13)), where
        failed = [result["line"] for result in results if "error" in result]
        assert (state.total, state.done, state.failed) == (12, 12, len(failed)), where
        if cancel_at is None:
            assert set(failed) - {2, 8, 11} == {5, 10, 12}, where
            assert error in ("held up", "overtaken") or {2, 8, 11} < set(failed), where
            assert all(r["text"] == f"to p{r['line'] - 1}" for r in results if "error" not in r)
            assert state.status == "completed", where
        names = {path.name for path in producer.store.folder(batch_id).path.iterdir()}
        assert names == {"results"}, where
        assert not list(producer.store.folder(batch_id).path.rglob(".*")), where
        if world.struck is None:
            assert strike_at > 200
            return
