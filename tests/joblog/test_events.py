"""``EventStream``: what is said is heard, and a lost subscription is reported once it is whole."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis

from openlora.joblog import (
    AsyncJobLog,
    EventStream,
    JobLog,
    async_redis_client,
    core,
    redis_client,
)
from openlora.local import ServerProcess
from openlora.protocol import codec, names
from openlora.protocol.events import Chunk
from tests.joblog.jobs import a_chunk, a_job

pytestmark = pytest.mark.services
_TIMEOUT_S = 20


class Heard:
    """Iterates a stream in a task; ``next`` is what it gave."""

    def __init__(self, stream: EventStream) -> None:
        self.stream = stream
        self._items: asyncio.Queue[tuple[Chunk, ...] | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for item in self.stream:
            self._items.put_nowait(item)

    async def next(self) -> tuple[Chunk, ...] | None:
        return await asyncio.wait_for(self._items.get(), _TIMEOUT_S)

    def is_silent(self) -> bool:
        return self._items.empty()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.stream.aclose()


def run(url: str, shards: list[int], test: Callable[[Heard], Awaitable[None]]) -> None:
    async def main() -> None:
        async with async_redis_client(url) as client:
            heard = Heard(AsyncJobLog(client).events(shards))
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    for shard in shards:
                        await heard.stream.add(shard)
                await test(heard)
            finally:
                await heard.close()

    asyncio.run(main())


def say(client: redis.Redis, chunk: Chunk) -> None:
    channel = names.events_channel(names.shard_of(chunk.job_id))
    client.spublish(channel, codec.encode([chunk]))


def test_one_append_is_one_message_a_shard(redis_url: str) -> None:
    client = redis_client(redis_url)
    log = JobLog(client)

    async def test(heard: Heard) -> None:
        jobs = [a_job(1), a_job(1), a_job(2)]
        log._run([core.store_call(job, 60_000) for job in jobs])
        claims = log.claim([job.job_id for job in jobs], "w")
        chunks = [a_chunk(job.job_id, c.epoch, 0) for job, c in zip(jobs, claims, strict=True)]
        log.append(chunks)
        messages = [await heard.next(), await heard.next()]
        assert sorted(messages, key=len) == [(chunks[2],), (chunks[0], chunks[1])]
        assert heard.is_silent()

    run(redis_url, [1, 2], test)


def test_shards_come_and_go_while_it_listens(redis_url: str) -> None:
    client = redis_client(redis_url)

    async def test(heard: Heard) -> None:
        first, second = a_chunk(a_job(1).job_id, 1, 0), a_chunk(a_job(2).job_id, 1, 0)
        say(client, second)
        await heard.stream.add(2)
        await heard.stream.add(2)
        say(client, second)
        assert await heard.next() == (second,)
        await heard.stream.remove(2)
        await heard.stream.remove(3)
        await heard.stream.add(4)  # confirmed after the unsubscribe, as commands keep their order
        say(client, second)
        say(client, first)
        assert await heard.next() == (first,)

    run(redis_url, [1], test)


def test_nothing_to_listen_to_at_first(redis_url: str) -> None:
    client = redis_client(redis_url)

    async def test(heard: Heard) -> None:
        chunk = a_chunk(a_job(5).job_id, 1, 0)
        await asyncio.wait_for(heard.stream.add(5), _TIMEOUT_S)
        say(client, chunk)
        assert await heard.next() == (chunk,)

    run(redis_url, [], test)


def test_a_message_that_is_none_of_ours_is_dropped(redis_url: str) -> None:
    client = redis_client(redis_url)

    async def test(heard: Heard) -> None:
        chunk = a_chunk(a_job(1).job_id, 1, 0)
        for garbage in (b"", b"\xff", b"{}", b'[["x"]]'):
            client.spublish(names.events_channel(1), garbage)
        say(client, chunk)
        assert await heard.next() == (chunk,)

    run(redis_url, [1], test)


def test_a_cut_connection_is_reported_after_the_subscription_is_whole(redis_url: str) -> None:
    client = redis_client(redis_url)

    async def test(heard: Heard) -> None:
        for _ in range(2):
            client.client_kill_filter(_type="pubsub")
            assert await heard.next() is None
            for shard in (1, 2, 3):
                chunk = a_chunk(a_job(shard).job_id, 1, 0)
                say(client, chunk)
                assert await heard.next() == (chunk,)

    run(redis_url, [1, 2, 3], test)


def test_a_restarted_server_is_found_again(fresh_redis: ServerProcess) -> None:
    async def test(heard: Heard) -> None:
        fresh_redis.kill()
        adding = asyncio.create_task(heard.stream.add(9))
        await asyncio.sleep(0)
        await asyncio.to_thread(fresh_redis.start)
        assert await heard.next() is None
        await asyncio.wait_for(adding, _TIMEOUT_S)
        for shard in (1, 9):
            chunk = a_chunk(a_job(shard).job_id, 1, 0)
            say(redis_client(fresh_redis.address), chunk)
            assert await heard.next() == (chunk,)

    run(fresh_redis.address, [1], test)


def test_a_silent_connection_is_cut_and_made_again(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIENT PAUSE holds the server's answers back, as a dead network path would."""
    monkeypatch.setattr("openlora.joblog.events._IDLE_S", 0.2)
    client = redis_client(redis_url)

    async def test(heard: Heard) -> None:
        await asyncio.sleep(0.7)
        assert heard.is_silent()  # idle, and answering: no false alarm
        client.client_pause(1000)
        assert await heard.next() is None

    run(redis_url, [1], test)
