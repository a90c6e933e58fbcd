"""Cancel, absence, resume, repetition and drain on real gateway processes."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from openlora.joblog import AsyncJobLog, JobLog, async_redis_client, redis_client
from openlora.local import ServerProcess
from openlora.protocol.events import Chunk, End
from openlora.protocol.names import SWEEPER_KEY, idempotency_key, job_key
from tests.conftest import Broker
from tests.gateway.client import (
    GRACE_S,
    generate,
    hang_up,
    receive,
    receive_all,
    receive_until_closed,
    send,
    text_of,
    wait_for,
    words,
)
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway

pytestmark = pytest.mark.services


def some_more(socket: ClientConnection, request_id: str) -> list[dict[str, Any]]:
    """The next frames of a long answer, up to its end by a cancel."""
    frames = [receive(socket) for _ in range(20)]
    send(socket, type="cancel", request_id=request_id)
    return frames + receive_all(socket, request_id)


def test_cancel_stops_the_work_at_the_worker(
    gateway: RunningGateway, slow_worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r", words(5000))
        frames = [receive(socket) for _ in range(5)]
        send(socket, type="cancel", request_id="r")
        frames += receive_all(socket, "r")
        assert frames[-1]["finish_reason"] == "cancelled"
        assert len(frames) < 200
        text_of(frames)
    wait_for(lambda: not slow_worker.running)


def test_a_cancel_is_kept_while_redis_is_away(
    embedded_broker: Broker, fresh_redis: ServerProcess, tmp_path: Path
) -> None:
    with (
        running_gateway(
            embedded_broker.bootstrap_servers, fresh_redis.address, tmp_path
        ) as gateway,
        connect(gateway.ws_url) as socket,
        redis_client(fresh_redis.address) as client,
    ):
        generate(socket, "r", "a b")
        job_id = receive(socket)["job_id"]
        claim = JobLog(client).claim([job_id], "w")[0]
        fresh_redis.stop()
        send(socket, type="cancel", request_id="r")
        wait_for(lambda: "cancel not marked yet" in gateway.log_text(), 30)
        fresh_redis.start()
        wait_for(lambda: client.hexists(job_key(job_id), "cancel"))
        JobLog(client).append([Chunk(job_id, claim.epoch, 0, end=End("cancelled"))])
        # the next frame: no error came in between
        done = receive(socket)
        assert (done["type"], done["finish_reason"]) == ("done", "cancelled")


def test_the_job_of_a_client_that_left_ends_after_the_grace_and_a_batch_job_goes_on(
    gateway: RunningGateway, slow_worker: ScriptedWorker, redis_address: str
) -> None:
    with connect(gateway.ws_url) as socket, redis_client(redis_address) as client:
        generate(socket, "batch", words(250), priority="batch")
        batch_id = receive(socket)["job_id"]
        generate(socket, "r", words(5000))
        while (frame := receive(socket))["request_id"] != "r":
            pass
        job_id = frame["job_id"]

        def lease_until() -> int:
            return int(client.hget(job_key(job_id), "lease_until") or 0)

        first = lease_until()
        wait_for(lambda: lease_until() > first)  # renewed while the client stays
        wait_for(lambda: job_id in slow_worker.running)
        left = time.monotonic()
        hang_up(socket)
        wait_for(lambda: job_id not in slow_worker.running, 30)
        assert time.monotonic() - left > GRACE_S * 0.6
    wait_for(lambda: batch_id not in slow_worker.running, 30)
    with connect(gateway.ws_url) as socket:
        send(socket, type="resume", request_id="s", job_id=batch_id)
        assert text_of(receive_all(socket, "s")) == words(250)


def test_a_stream_goes_on_at_another_gateway(
    gateway: RunningGateway,
    embedded_broker: Broker,
    redis_address: str,
    tmp_path: Path,
    slow_worker: ScriptedWorker,
) -> None:
    with running_gateway(embedded_broker.bootstrap_servers, redis_address, tmp_path) as second:
        with connect(gateway.ws_url) as socket:
            generate(socket, "r", words(5000))
            frames = [receive(socket) for _ in range(20)]
            hang_up(socket)
        with connect(second.ws_url) as socket:
            last = frames[-1]
            send(socket, type="resume", request_id="s", job_id=last["job_id"], after=last["index"])
            accepted, *rest = some_more(socket, "s")
            assert (accepted["type"], accepted["adapters"]) == ("accepted", [])
            assert rest[0]["index"] == last["index"] + 1
            assert words(5000).startswith(text_of(frames + rest))


def test_a_resume_beyond_the_log_is_refused(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r", "a b c")
        job_id = receive_all(socket, "r")[0]["job_id"]
        send(socket, type="resume", request_id="s", job_id=job_id, after=3)
        error = receive(socket)
        assert (error["code"], error["request_id"]) == ("invalid_request", "s")
        assert error["message"].startswith("after is 3, but the job has no token of that index")
        send(socket, type="resume", request_id="s", job_id=job_id, after=1)
        assert text_of(receive_all(socket, "s")) == " c"


def test_a_resume_that_names_its_claim_is_told_where_the_log_holds_another_text(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r", "a b c")
        accepted, first, *_ = receive_all(socket, "r")
        named = {"type": "resume", "job_id": accepted["job_id"], "after": 1}
        send(socket, request_id="s", epoch=first["epoch"], **named)
        assert text_of(receive_all(socket, "s")) == " c"
        send(socket, request_id="t", epoch=first["epoch"] - 1, **named)
        _, restarted, *rest = receive_all(socket, "t")
        assert restarted["type"] == "restarted"
        assert text_of(rest) == "a b c"
        # it has seen more than Redis kept: no mistake of the client
        send(socket, request_id="u", epoch=first["epoch"], **(named | {"after": 7}))
        _, restarted, *rest = receive_all(socket, "u")
        assert restarted["type"] == "restarted"
        assert text_of(rest) == "a b c"


def test_an_idempotency_key_runs_a_request_once(
    gateway: RunningGateway, worker: ScriptedWorker
) -> None:
    with connect(gateway.ws_url) as socket:
        generate(socket, "r1", "a b", idempotency_key="k1")
        first = receive_all(socket, "r1")
        generate(socket, "r2", "a b", idempotency_key="k1")
        second = receive_all(socket, "r2")
        assert second[0]["job_id"] == first[0]["job_id"]
        assert text_of(second) == "a b"
        generate(socket, "r3", "another", idempotency_key="k1")
        assert receive_all(socket, "r3")[-1]["code"] == "invalid_request"
    assert len(worker.jobs) == 1


def test_a_key_that_a_refused_request_left_behind_is_free_at_the_next_try(
    gateway: RunningGateway, redis_address: str, worker: ScriptedWorker
) -> None:
    """As where Redis, or the gateway, went between the two steps of a refusal."""

    async def discard(job_id: str) -> None:
        async with async_redis_client(redis_address) as client:
            await AsyncJobLog(client).discard(job_id)

    with connect(gateway.ws_url) as socket:
        generate(socket, "r1", "a b", idempotency_key="left")
        job_id = receive_all(socket, "r1")[0]["job_id"]
        asyncio.run(discard(job_id))
        generate(socket, "r2", "a b", idempotency_key="left")
        assert receive(socket)["code"] == "overloaded"
        generate(socket, "r3", "a b", idempotency_key="left")
        assert text_of(receive_all(socket, "r3")) == "a b"


@pytest.mark.long
def test_a_repeated_key_is_accepted_no_sooner_than_its_first_request(
    fresh_broker: Broker, redis_address: str, tmp_path: Path
) -> None:
    with (
        running_gateway(fresh_broker.bootstrap_servers, redis_address, tmp_path) as gateway,
        connect(gateway.ws_url) as first,
        connect(gateway.ws_url) as second,
        redis_client(redis_address) as client,
    ):
        fresh_broker.server.stop()
        generate(first, "r", "a b", idempotency_key="k-away")
        wait_for(lambda: client.exists(idempotency_key("default", "k-away")))
        generate(second, "s", "a b", idempotency_key="k-away")
        assert receive(second)["code"] == "overloaded"
        assert receive(first)["code"] == "overloaded"
        assert not client.exists(idempotency_key("default", "k-away"))
        gateway.process.kill()  # it would look for its broker for a while yet


def test_sigterm_lets_streams_end_then_closes_with_1012(
    embedded_broker: Broker, redis_address: str, tmp_path: Path, worker: ScriptedWorker
) -> None:
    with (
        running_gateway(
            embedded_broker.bootstrap_servers,
            redis_address,
            tmp_path,
            OPENLORA_DRAIN_TIMEOUT_S="60",
        ) as gateway,
        connect(gateway.ws_url) as socket,
    ):
        worker.pause()  # the stream goes on once the gateway has been seen to drain
        generate(socket, "r", words(100))
        frames = [receive(socket)]
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{gateway.url}/readyz").status_code == 503)
        generate(socket, "late", "x")
        late = receive(socket)
        assert (late["request_id"], late["code"]) == ("late", "overloaded")
        worker.resume()
        frames += receive_all(socket, "r")
        assert text_of(frames) == words(100)
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012
        assert gateway.process.wait(10) == 0


def test_a_stream_cut_off_by_the_drain_can_be_resumed(
    gateway: RunningGateway,
    embedded_broker: Broker,
    redis_address: str,
    tmp_path: Path,
    slow_worker: ScriptedWorker,
) -> None:
    with (
        running_gateway(
            embedded_broker.bootstrap_servers,
            redis_address,
            tmp_path,
            OPENLORA_DRAIN_TIMEOUT_S="0.3",
        ) as leaving,
        connect(leaving.ws_url) as socket,
    ):
        generate(socket, "r", words(5000))
        frames = [receive(socket), receive(socket)]
        leaving.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as caught:
            receive_until_closed(socket, frames)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012
    with connect(gateway.ws_url) as socket:
        last = frames[-1]
        send(socket, type="resume", request_id="s", job_id=last["job_id"], after=last["index"])
        assert words(5000).startswith(text_of(frames + some_more(socket, "s")))


def test_a_gateway_whose_background_work_failed_ends_for_its_supervisor(
    embedded_broker: Broker, fresh_redis: ServerProcess, tmp_path: Path
) -> None:
    with running_gateway(
        embedded_broker.bootstrap_servers, fresh_redis.address, tmp_path
    ) as gateway:
        with redis_client(fresh_redis.address) as client:
            # of another kind than the sweeper can use, which no retry mends
            client.delete(SWEEPER_KEY)
            client.rpush(SWEEPER_KEY, "x")
        assert gateway.process.wait(15) == 1
        assert "a background task failed" in gateway.log_text()
