"""Outbox: who writes its frames, and in which order."""

from __future__ import annotations

import asyncio

import pytest

from gateway.follower import MAX_QUEUED_FRAMES, Outbox
from gateway.metrics import Metrics
from tests.gateway.writers import Socket, full_socket


def test_the_sender_waits_for_work_and_the_reader_for_room() -> None:
    async def scenario() -> None:
        outbox = Outbox(full_socket(), Metrics())
        sender = asyncio.create_task(outbox.wait())
        await asyncio.sleep(0)
        assert not sender.done()
        outbox.put("x")
        await sender
        for _ in range(MAX_QUEUED_FRAMES):
            outbox.put("x")
        reader = asyncio.create_task(outbox.room())
        await asyncio.sleep(0)
        assert not reader.done()
        assert len(outbox.take()) == MAX_QUEUED_FRAMES + 1
        await reader
        waiting = asyncio.create_task(outbox.wait())
        await asyncio.sleep(0)
        outbox.close()
        await waiting

    asyncio.run(scenario())


def test_frames_are_written_at_once_while_the_socket_takes_them() -> None:
    asyncio.run(_flush_with_and_without_room())


async def _flush_with_and_without_room() -> None:
    socket, metrics = Socket(), Metrics()
    outbox = Outbox(socket, metrics)
    outbox.put("before the sender waits")
    assert socket.writes == []

    async def send_all() -> None:
        while not outbox.closed:
            await outbox.wait()
            await outbox.send()

    sender = asyncio.create_task(send_all())
    await asyncio.sleep(0)
    outbox.frames += ["a", "b"]
    outbox.flush()
    assert socket.writes == [["before the sender waits"], ["a", "b"]]
    socket.takes_frames = False
    outbox.put("c")
    await asyncio.sleep(0)
    outbox.put("d")
    socket.takes_frames = True
    outbox.put("e")  # does not overtake what the sender has in hand
    while len(socket.frames) < 6:
        await asyncio.sleep(0)
    assert socket.writes[2:] == [["c", "d", "e"]]
    assert metrics.frames_sent == 6
    outbox.close()
    await sender


@pytest.mark.parametrize("is_joint", [False, True])
def test_frames_wait_for_the_sender_between_its_waking_and_its_wait(is_joint: bool) -> None:
    asyncio.run(_flush_while_the_sender_wakes(is_joint))


async def _flush_while_the_sender_wakes(is_joint: bool) -> None:
    def flush() -> None:
        outbox.flush([] if is_joint else None)

    socket = Socket()
    outbox = Outbox(socket, Metrics())
    sender = asyncio.create_task(outbox.wait())
    await asyncio.sleep(0)
    outbox.wake()  # as for a stream that lags
    outbox.frames.append("a")
    flush()
    assert socket.writes == []
    await sender
    await outbox.send()
    sender = asyncio.create_task(outbox.wait())
    await asyncio.sleep(0)
    outbox.frames.append("b")
    flush()
    outbox.close()
    outbox.frames.append("c")
    flush()
    assert socket.writes == [["a"], ["b"]]
    await sender
