"""Relay and connection where an event and an answer of Redis cross: no stream is left waiting.

The job log is a fake: on a real one nothing makes the two cross when a test wants it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest

from gateway.auth import KeyPolicy
from gateway.connection import Connection
from gateway.follower import Follower, Outbox
from gateway.intake import Intake
from gateway.metrics import Metrics
from gateway.relay import Relay
from gateway.stream import TokenStream
from openlora.errors import Overloaded
from openlora.joblog import AsyncJobLog, JobView
from openlora.protocol.events import Chunk, End, Token
from openlora.protocol.jobs import Job
from openlora.sampling_params import SamplingParams
from tests.gateway.writers import Socket, full_socket

JOB_ID = "07" + "a" * 24
JOB = Job(JOB_ID, "t", 1, SamplingParams(seed=1), prompt="x")
LOG = (Chunk(JOB_ID, 1, 0, (Token(5, "Hi"),)), Chunk(JOB_ID, 1, 1, (), End("stop")))


class CrossingLog:
    """A job log and its event stream; ``meanwhile`` happens while an answer is on its way."""

    def __init__(self) -> None:
        self.length = len(LOG)
        self.is_lost = False
        self.reconnects = 0
        self.renewed: list[str] = []
        self.cancelled: list[str] = []
        self.takes_cancels = True
        self.subscribed: set[int] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    def events(self, shards: Iterable[int]) -> CrossingLog:
        self.subscribed.update(shards)
        return self

    def __aiter__(self) -> CrossingLog:
        return self

    async def __anext__(self) -> tuple[Chunk, ...] | None:
        if not self.reconnects:
            raise StopAsyncIteration
        self.reconnects -= 1
        return None

    async def add(self, shard: int) -> None:
        self.subscribed.add(shard)

    async def remove(self, shard: int) -> None:
        self.subscribed.remove(shard)
        self.meanwhile()
        await asyncio.sleep(0)

    async def read(self, job_id: str, after: int = -1) -> JobView | None:
        chunks = LOG[: self.length]
        self.meanwhile()
        if self.is_lost:
            return None
        return JobView(JOB, 1, chunks, chunks[-1].end, False)

    async def renew_leases(self, job_ids: Iterable[str], lease_ms: int) -> None:
        self.renewed += job_ids
        self.meanwhile()

    async def cancel(self, job_id: str) -> bool:
        self.cancelled.append(job_id)
        if not self.takes_cancels:
            raise Overloaded("Redis does not answer", retry_after_ms=1)
        return True


def test_an_end_published_while_a_resume_reads_the_log_is_not_missed() -> None:
    frames = asyncio.run(_resume_while_the_end_comes())
    assert [frame["type"] for frame in frames] == ["accepted", "token", "done"]


async def _resume_while_the_end_comes() -> list[dict[str, Any]]:
    log = CrossingLog()
    job_log = cast("AsyncJobLog", log)
    relay = Relay(job_log, 0, 30_000, Metrics())

    def the_job_ends() -> None:
        log.length = len(LOG)
        relay.dispatch([LOG[-1]])

    log.length, log.meanwhile = 1, the_job_ends
    return await _resumed(job_log, relay)


async def _resumed(job_log: AsyncJobLog, relay: Relay, after: int = -1) -> list[dict[str, Any]]:
    """What a client gets that resumes the job behind ``after``."""
    received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    sent: list[dict[str, Any]] = []

    def on_frame(frame: str) -> None:
        sent.append(json.loads(frame))
        if sent[-1]["type"] in ("done", "error"):
            received.put_nowait({"type": "websocket.disconnect"})

    connection = Connection(
        received.get,
        Socket(on_frame=on_frame),
        tenant="t",
        policy=KeyPolicy(),
        job_log=job_log,
        intake=cast("Intake", None),
        relay=relay,
        metrics=Metrics(),
    )
    resume = {"type": "resume", "request_id": "r", "job_id": JOB_ID, "after": after}
    received.put_nowait({"type": "websocket.receive", "text": json.dumps(resume)})
    await asyncio.wait_for(connection.run(), 5)
    return sent


def test_a_resume_waits_for_a_log_that_redis_lost_a_moment_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.connection.RESUME_RETRY_S", 0.0)
    frames = asyncio.run(_resume_of_a_lost_log(is_redis_back=True))
    assert [frame["type"] for frame in frames] == ["accepted", "token", "done"]


def test_a_resume_of_an_unknown_job_is_refused_at_once() -> None:
    [error] = asyncio.run(_resume_of_a_lost_log(is_redis_back=False))
    assert error["code"] == "job_not_found"


async def _resume_of_a_lost_log(*, is_redis_back: bool) -> list[dict[str, Any]]:
    log = CrossingLog()
    job_log = cast("AsyncJobLog", log)
    relay = Relay(job_log, 0, 30_000, Metrics())
    log.reconnects = int(is_redis_back)
    await relay.run()
    log.is_lost = True
    reads = 0

    def a_worker_opens_it_anew() -> None:
        nonlocal reads
        reads += 1
        log.is_lost = reads <= 3

    log.meanwhile = a_worker_opens_it_anew
    return await _resumed(job_log, relay)


def test_a_resume_behind_the_end_of_a_log_without_its_last_moments_begins_again() -> None:
    frames = asyncio.run(_resume_beyond_the_log(is_redis_back=True))
    assert [frame["type"] for frame in frames] == ["accepted", "restarted", "token", "done"]


def test_a_resume_behind_the_end_of_a_whole_log_is_refused() -> None:
    [error] = asyncio.run(_resume_beyond_the_log(is_redis_back=False))
    assert error["code"] == "invalid_request"


async def _resume_beyond_the_log(*, is_redis_back: bool) -> list[dict[str, Any]]:
    log = CrossingLog()
    relay = Relay(cast("AsyncJobLog", log), 0, 30_000, Metrics())
    log.reconnects = int(is_redis_back)
    await relay.run()
    return await _resumed(cast("AsyncJobLog", log), relay, after=5)


def test_a_stream_whose_log_stays_lost_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.relay._LOST_LOG_RETRY_S", 0.0)
    asyncio.run(_refill_without_a_log(monkeypatch))


async def _refill_without_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = CrossingLog()
    log.is_lost = True
    relay = Relay(cast("AsyncJobLog", log), 0, 30_000, Metrics())
    ended: list[str] = []
    outbox = Outbox(full_socket(), Metrics())
    follower = Follower(TokenStream("r", JOB_ID), outbox, Metrics(), lambda: ended.append("r"))
    await relay.follow(follower)
    follower.begin()
    await relay.refill(follower)
    while follower not in outbox.lagging:  # until it is asked again
        await asyncio.sleep(0)
    assert outbox.lagging.pop(follower) is None
    assert not ended
    assert not outbox.frames
    monkeypatch.setattr("gateway.relay.LOST_LOG_PATIENCE_S", 0.0)
    await relay.refill(follower)
    assert ended == ["r"]
    assert [json.loads(frame)["code"] for frame in outbox.frames] == ["job_not_found"]


def test_a_shard_resumed_on_while_another_is_left_stays_subscribed() -> None:
    asyncio.run(_follow_while_shards_are_left())


async def _follow_while_shards_are_left() -> None:
    log = CrossingLog()
    relay = Relay(cast("AsyncJobLog", log), 0, 1, Metrics())
    idle = [_follower(shard) for shard in range(1, 4)]
    for follower in idle:
        await relay.follow(follower)
        relay.unfollow(follower)
    again: dict[int, asyncio.Task[None]] = {}

    def resume_on_the_rest() -> None:
        for shard in [*log.subscribed - {0, *again}]:
            again[shard] = asyncio.create_task(relay.follow(_follower(shard)))

    log.meanwhile = resume_on_the_rest
    renewing = asyncio.create_task(relay.renew_leases())
    while not again:
        await asyncio.sleep(0)
    await asyncio.sleep(0.02)  # and what it does then
    renewing.cancel()
    await asyncio.gather(*again.values())
    assert again.keys() <= log.subscribed
    assert again


def test_behind_a_reconnect_leases_are_renewed_and_cancels_marked_again_at_once() -> None:
    asyncio.run(_reconnect_with_followers())


async def _reconnect_with_followers() -> None:
    log = CrossingLog()
    relay = Relay(cast("AsyncJobLog", log), 0, 3_600_000, Metrics())
    followers = [_follower(shard) for shard in range(1, 4)]
    watched, unwanted, batch = followers
    watched.leased = unwanted.leased = unwanted.cancelled = True
    for follower in followers:
        await relay.follow(follower)
    renewing = asyncio.create_task(relay.renew_leases())
    await asyncio.sleep(0.01)
    assert not log.renewed
    log.reconnects = 1
    await relay.run()
    while not log.renewed:
        await asyncio.sleep(0)
    renewing.cancel()
    assert log.renewed == [watched.stream.job_id, unwanted.stream.job_id]
    assert log.cancelled == [unwanted.stream.job_id]
    assert batch.stream.job_id not in log.renewed


def test_cancels_that_redis_does_not_take_hold_up_no_leases() -> None:
    asyncio.run(_renew_with_cancels_refused())


async def _renew_with_cancels_refused() -> None:
    log = CrossingLog()
    log.takes_cancels = False
    relay = Relay(cast("AsyncJobLog", log), 0, 1, Metrics())
    for shard in (1, 2):
        follower = _follower(shard)
        follower.leased = follower.cancelled = True
        await relay.follow(follower)
    renewing = asyncio.create_task(relay.renew_leases())
    while not log.renewed:
        await asyncio.sleep(0)
    renewing.cancel()
    assert len(log.cancelled) == 1
    assert len(log.renewed) == 2


def _follower(shard: int) -> Follower:
    stream = TokenStream("r", f"{shard:02x}" + "a" * 24)
    return Follower(stream, Outbox(full_socket(), Metrics()), Metrics(), lambda: None)
