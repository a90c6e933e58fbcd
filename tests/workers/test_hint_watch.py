"""Hints over Redis: said by gateways and producers, heard by workers, also behind a restart."""

from __future__ import annotations

import asyncio
import threading

import pytest

from openlora.joblog import async_redis_client, hints, redis_client
from openlora.joblog.hints import AsyncHints
from tests.workers.running import wait_until
from workers.hint_watch import HintWatch

pytestmark = pytest.mark.services


class Heard:
    """What the consumer's attention would be."""

    def __init__(self) -> None:
        self.hints = 0
        self.hears = threading.Event()

    def hint(self) -> None:
        self.hints += 1

    def hears_hints(self, heard: bool) -> None:
        (self.hears.set if heard else self.hears.clear)()


@pytest.fixture
def heard(fresh_redis):
    found = Heard()
    watch = HintWatch(redis_client(fresh_redis.address), found)
    watch.start()
    assert found.hears.wait(20)
    wait_until(lambda: found.hints == 1)  # there may have been messages before
    yield found
    watch.stop()


def test_what_a_producer_says_is_heard(fresh_redis, heard):
    hints.say(redis_client(fresh_redis.address))
    wait_until(lambda: heard.hints == 2)


def test_a_gateway_says_it_once_for_many_jobs(fresh_redis, heard, monkeypatch):
    monkeypatch.setattr(hints, "EVERY_S", 60.0)

    async def publish():
        client = async_redis_client(fresh_redis.address)
        said = AsyncHints(client)
        for _ in range(50):
            await said.say()
        await client.aclose()

    asyncio.run(publish())
    wait_until(lambda: heard.hints == 2)
    hints.say(redis_client(fresh_redis.address))
    wait_until(lambda: heard.hints == 3)


def test_they_are_heard_again_behind_a_restart(fresh_redis, heard):
    fresh_redis.kill()
    wait_until(lambda: not heard.hears.is_set())
    fresh_redis.start()
    assert heard.hears.wait(30)
    wait_until(lambda: heard.hints == 2)  # of what may have come meanwhile


def test_whoever_cannot_say_it_goes_on():
    asyncio.run(AsyncHints(async_redis_client("redis://127.0.0.1:1")).say())
    hints.say(redis_client("redis://127.0.0.1:1"))
