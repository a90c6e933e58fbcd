"""One connection for all tasks: each gets its own replies, and a failure is everybody's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
import redis

from openlora.joblog import async_redis_client
from openlora.joblog.script_channel_async import AsyncScriptChannel
from openlora.joblog.scripts import Call, Script

pytestmark = pytest.mark.services

ECHO = Script("return ARGV[1]")
FAIL = Script("return redis.error_reply('ERR no')")
SLOW = Script("local n = 0 for i = 1, 3e7 do n = n + i end return n")


def echo(text: str) -> Call:
    return Call(ECHO, [], [text])


def run(url: str, test: Callable[[AsyncScriptChannel, redis.asyncio.Redis], Awaitable[None]]):
    async def main() -> None:
        async with async_redis_client(url) as client:
            for script in (ECHO, FAIL, SLOW):
                await client.script_load(script.source)
            await asyncio.wait_for(test(AsyncScriptChannel(client), client), 20)

    asyncio.run(main())


def test_each_task_gets_its_own_replies(redis_url: str) -> None:
    async def test(channel: AsyncScriptChannel, client: redis.asyncio.Redis) -> None:
        async def ask(number: int) -> None:
            for turn in range(20):
                texts = [f"{number} {turn} {part}" for part in range(number % 3 + 1)]
                replies = await channel.run([echo(text) for text in texts])
                assert replies == [text.encode() for text in texts]

        first = await client.client_id()  # older ones are other tests'
        await asyncio.gather(*(ask(number) for number in range(50)))
        connections = [one for one in await client.client_list() if int(one["id"]) >= first]
        assert len(connections) <= 2

    run(redis_url, test)


def test_one_error_spoils_no_other(redis_url: str) -> None:
    async def test(channel: AsyncScriptChannel, client: redis.asyncio.Redis) -> None:
        both = await asyncio.gather(
            channel.run([echo("a"), Call(FAIL, [], []), echo("b")]), channel.run([echo("c")])
        )
        assert (both[0][0], both[0][2], both[1]) == (b"a", b"b", [b"c"])
        assert isinstance(both[0][1], redis.ResponseError)

    run(redis_url, test)


def test_a_task_that_is_cancelled_takes_nobody_elses_reply(redis_url: str) -> None:
    async def test(channel: AsyncScriptChannel, client: redis.asyncio.Redis) -> None:
        first = asyncio.create_task(channel.run([Call(SLOW, [], [])]))
        await asyncio.sleep(0.01)
        leaves, stays = (asyncio.create_task(channel.run([echo(text)])) for text in "ab")
        await asyncio.sleep(0)
        leaves.cancel()
        first.cancel()
        assert await stays == [b"b"]
        assert await channel.run([echo("c")]) == [b"c"]

    run(redis_url, test)


def test_a_connection_that_redis_closed_is_made_anew(redis_url: str) -> None:
    async def test(channel: AsyncScriptChannel, client: redis.asyncio.Redis) -> None:
        assert await channel.run([echo("a")]) == [b"a"]
        await client.client_kill_filter(_type="normal", skipme=True)
        assert await channel.run([echo("b")]) == [b"b"]

    run(redis_url, test)


def test_a_server_that_is_not_there_is_an_error_for_all_each_time() -> None:
    async def main() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{unused.getsockname()[1]}/0"
            async with async_redis_client(url) as client:
                channel = AsyncScriptChannel(client)
                for _ in range(2):
                    calls = (channel.run([echo(text)]) for text in "abc")
                    for result in await asyncio.gather(*calls, return_exceptions=True):
                        assert isinstance(result, redis.ConnectionError)

    asyncio.run(main())


def test_a_channel_whose_work_is_cancelled_leaves_nobody_waiting(redis_url: str) -> None:
    async def test(channel: AsyncScriptChannel, client: redis.asyncio.Redis) -> None:
        first = asyncio.create_task(channel.run([Call(SLOW, [], [])]))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(channel.run([echo("a")]))
        await asyncio.sleep(0)
        assert channel._task is not None
        channel._task.cancel()
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert all(isinstance(result, redis.ConnectionError) for result in results)
        assert await channel.run([echo("b")]) == [b"b"]

    run(redis_url, test)
