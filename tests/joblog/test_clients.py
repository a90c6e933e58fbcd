"""Connections: what an absent, full or wrongly named server looks like to the caller."""

from __future__ import annotations

import asyncio

import pytest
import redis

from openlora.errors import Overloaded, SetupError
from openlora.joblog import AsyncJobLog, JobLog, async_redis_client, reach_redis, redis_client
from openlora.local import ServerProcess
from tests.joblog.jobs import a_job
from tests.joblog.test_log_async import run

pytestmark = pytest.mark.services


@pytest.fixture
def worker(redis_url: str) -> JobLog:
    return JobLog(redis_client(redis_url))


def test_a_server_that_is_not_there_is_overload_with_its_address(port: int) -> None:
    async def test(log: AsyncJobLog) -> None:
        with pytest.raises(Overloaded, match=rf"Redis at 127\.0\.0\.1:{port} does not answer"):
            await log.read(a_job().job_id)

    run(f"redis://:secret@127.0.0.1:{port}/0", test)


@pytest.mark.parametrize("setting", ["maxmemory", "min-replicas-to-write"])
def test_a_server_that_takes_no_writes_is_overload(
    redis_url: str, worker: JobLog, setting: str
) -> None:
    async def test(log: AsyncJobLog) -> None:
        worker._redis.config_set(setting, 1)
        try:
            with pytest.raises(Overloaded, match="takes no writes"):
                await log.store(a_job(), 60_000)
        finally:
            worker._redis.config_set(setting, 0)

    run(redis_url, test)


@pytest.mark.parametrize("make", [redis_client, async_redis_client])
def test_a_bad_url_is_a_set_up_error_without_its_password(make) -> None:
    with pytest.raises(SetupError, match="not valid") as caught:
        make("http://:secret@host/0")
    assert "secret" not in caught.value.message


def test_two_hundred_calls_at_once_share_the_connections(redis_url: str, worker: JobLog) -> None:
    first = worker._redis.client_id()  # older ones are other tests'

    async def test(log: AsyncJobLog) -> None:
        await asyncio.gather(*(log.store(a_job(), 60_000) for _ in range(200)))
        connections = [one for one in worker._redis.client_list() if int(one["id"]) > first]
        assert len(connections) < 40

    run(redis_url, test)


def test_a_write_to_a_closed_transport_is_a_lost_connection(redis_url: str) -> None:
    async def main() -> None:
        async with async_redis_client(redis_url) as client:
            connection = await client.connection_pool.get_connection()
            connection._writer.transport.abort()
            with pytest.raises(redis.ConnectionError):
                await connection.send_command("PING")
            await client.connection_pool.release(connection)
            assert await client.ping()

    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_a_start_without_redis_says_where_it_should_be(port: int) -> None:
    with (
        redis_client(f"redis://:secret@127.0.0.1:{port}/0") as client,
        pytest.raises(SetupError, match=rf"127\.0\.0\.1:{port} does not answer") as caught,
    ):
        reach_redis(client, timeout_s=0.1)
    assert "secret" not in caught.value.message


def test_a_start_with_a_wrong_password_says_so(fresh_redis: ServerProcess) -> None:
    url = fresh_redis.address.replace("redis://:", "redis://:wrong")
    with redis_client(url) as client, pytest.raises(SetupError, match="refuses the password"):
        reach_redis(client, timeout_s=0.1)
