"""Outbox and follower: bounded memory, nothing lost, nothing before `accepted`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.follower import MAX_HELD_CHUNKS, MAX_QUEUED_FRAMES, Follower, Outbox
from gateway.metrics import Metrics
from gateway.stream import TokenStream
from openlora.joblog import JobView
from openlora.protocol.events import Chunk, End, Token
from openlora.protocol.jobs import Job
from openlora.sampling_params import SamplingParams
from tests.gateway.writers import Socket, full_socket

JOB_ID = "07" + "a" * 24
JOB = Job(JOB_ID, "t", 1, SamplingParams(seed=1), prompt="x")


def chunks(count: int) -> list[Chunk]:
    tokens = [Chunk(JOB_ID, 1, i, (Token(i, f"{i} "),)) for i in range(count)]
    return [*tokens, Chunk(JOB_ID, 1, count, (), End("stop", completion_tokens=count))]


def view(log: list[Chunk], after: int = -1) -> JobView:
    newer = tuple(c for c in log if c.end or c.first_index + len(c.tokens) > after + 1)
    return JobView(JOB, 1, newer, log[-1].end if log else None, False)


def new_follower() -> Follower:
    return Follower(
        TokenStream("r", JOB_ID), Outbox(full_socket(), Metrics()), Metrics(), lambda: None
    )


def drain(follower: Follower) -> list[dict[str, Any]]:
    return [json.loads(frame) for frame in follower.outbox.take()]


def indices(frames: list[dict[str, Any]]) -> list[int]:
    return [frame["index"] for frame in frames if frame["type"] == "token"]


def test_nothing_overtakes_accepted_and_what_came_before_is_kept() -> None:
    follower, log = new_follower(), chunks(3)
    for chunk in log[:2]:
        assert not follower.take(chunk)
    assert follower.outbox.frames == []
    assert not follower.begin()
    assert not follower.outbox.lagging
    assert indices(drain(follower)) == [0, 1]
    assert not follower.take(log[2])
    assert follower.take(log[3])


def test_a_job_that_ends_before_it_is_accepted() -> None:
    follower, log = new_follower(), chunks(1)
    for chunk in log:
        follower.take(chunk)
    assert follower.begin()
    assert [frame["type"] for frame in drain(follower)] == ["token", "done"]


def test_what_is_more_than_may_be_kept_is_read() -> None:
    follower, log = new_follower(), chunks(MAX_HELD_CHUNKS + 1)
    for chunk in log:
        follower.take(chunk)
    assert not follower.begin()
    assert list(follower.outbox.lagging) == [follower]
    follower.begin_read()
    assert follower.catch_up(view(log), whole=True)
    assert indices(drain(follower)) == [*range(MAX_HELD_CHUNKS + 1)]


def test_a_follower_that_missed_nothing_reads_nothing() -> None:
    follower = new_follower()
    follower.begin()
    assert not follower.outbox.lagging
    assert follower.take(chunks(0)[0])


def test_a_full_outbox_takes_no_more_tokens() -> None:
    follower, log = new_follower(), chunks(3 * MAX_QUEUED_FRAMES)
    follower.begin()
    for chunk in log:
        assert not follower.take(chunk)
    assert len(follower.outbox.frames) == MAX_QUEUED_FRAMES
    seen: list[int] = []
    while follower.stream.end is None:
        seen += indices(drain(follower))
        assert follower in follower.outbox.lagging
        del follower.outbox.lagging[follower]
        follower.begin_read()
        follower.catch_up(view(log, follower.stream.next_index - 1), whole=False)
        assert len(follower.outbox.frames) <= MAX_QUEUED_FRAMES + 1
    seen += indices(drain(follower))
    assert seen == [*range(3 * MAX_QUEUED_FRAMES)]


def test_an_event_that_comes_while_the_log_is_read_follows_what_was_read() -> None:
    follower, log = new_follower(), chunks(2)
    follower.begin()
    follower.lag()
    del follower.outbox.lagging[follower]
    follower.take(log[0])  # dropped: the log has it by the time it is read
    follower.begin_read()
    old = view(log[:1])
    follower.take(log[1])  # published after the log was read, before the answer is looked at
    assert not follower.catch_up(old, whole=True)
    assert not follower.outbox.lagging
    assert indices(drain(follower)) == [0, 1]


@given(st.lists(st.sampled_from(["event", "lost", "drain", "read", "begin_read"]), max_size=60))
def test_in_any_order_of_events_losses_and_reads_each_token_comes_once(steps: list[str]) -> None:
    follower, log = new_follower(), chunks(60)
    follower.begin()
    frames: list[dict[str, Any]] = []
    published = 0
    answer: JobView | None = None  # of a read whose answer is on its way
    for step in steps:
        if step == "drain":
            frames += drain(follower)
        elif step == "begin_read":
            if answer is None and follower in follower.outbox.lagging:
                del follower.outbox.lagging[follower]
                follower.begin_read()
                answer = view(log[:published], follower.stream.next_index - 1)
        elif step == "read":
            if answer is not None:
                follower.catch_up(answer, whole=False)
                answer = None
            else:
                _read(follower, log[:published])
        else:
            if step == "event":
                follower.take(log[published])
            published += 1
    if answer is not None:
        follower.catch_up(answer, whole=False)
    follower.miss()  # as after a reconnect
    _read(follower, log)
    frames += drain(follower)
    assert indices(frames) == [*range(60)]
    assert frames[-1]["type"] == "done"


def _read(follower: Follower, log: list[Chunk]) -> None:
    if follower in follower.outbox.lagging:
        del follower.outbox.lagging[follower]
        follower.begin_read()
        follower.catch_up(view(log, follower.stream.next_index - 1), whole=False)


def test_an_outbox_that_is_full_is_written_before_an_event_is_dropped() -> None:
    asyncio.run(_fill_without_a_flush())


async def _fill_without_a_flush() -> None:
    socket, log = Socket(), chunks(MAX_QUEUED_FRAMES + 1)
    follower = Follower(
        TokenStream("r", JOB_ID), Outbox(socket, Metrics()), Metrics(), lambda: None
    )
    follower.begin()
    sender = asyncio.create_task(follower.outbox.wait())
    await asyncio.sleep(0)
    for chunk in log[:-1]:
        follower.take(chunk)
    assert [len(frames) for frames in socket.writes] == [MAX_QUEUED_FRAMES]
    assert len(follower.outbox.frames) == 1
    assert not follower.outbox.lagging
    sender.cancel()


@given(st.lists(st.sampled_from(["event", "lost", "flush", "full", "room"]), max_size=60))
def test_whatever_the_socket_takes_each_token_is_written_once(steps: list[str]) -> None:
    asyncio.run(_follow_with_a_moody_socket(steps))


async def _follow_with_a_moody_socket(steps: list[str]) -> None:
    log = chunks(60)
    socket = Socket()
    outbox = Outbox(socket, Metrics())
    follower = Follower(TokenStream("r", JOB_ID), outbox, Metrics(), lambda: None)
    published = 0

    async def send_all() -> None:
        while not outbox.closed:
            await outbox.wait()
            if outbox.frames:
                await outbox.send()
            if outbox.lagging and not outbox.frames:
                _read(follower, log[:published])

    sender = asyncio.create_task(send_all())
    follower.begin()
    for step in steps:
        match step:
            case "full" | "room":
                socket.takes_frames = step == "room"
            case "flush":
                outbox.flush()
                await asyncio.sleep(0)
            case "event":
                follower.take(log[published])
        published += step in ("event", "lost")
    socket.takes_frames, published = True, len(log)
    follower.miss()
    while follower.stream.end is None or outbox.frames:
        await asyncio.sleep(0)
    frames = [json.loads(frame) for frame in socket.frames]
    assert indices(frames) == [*range(60)]
    assert frames[-1]["type"] == "done"
    outbox.close()
    await sender
