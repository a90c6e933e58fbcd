"""Each process of a running batch is killed in turn: nothing is lost, nothing comes twice."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.producer.bulk.running import BulkSystem, running_bulk

pytestmark = pytest.mark.services

LINES = 3000
KILL_AT = 400


def run_with(directory: Path, kill: Callable[[BulkSystem], None], timeout_s: float) -> None:
    """A batch of ``LINES`` lines, ``kill`` in the middle of it, and every line exactly once."""
    with running_bulk(directory) as bulk:
        bulk.register("a", "b", "c")
        bulk.start_worker("scripted:40")
        bulk.start_producer()
        data = b"".join(
            b'{"prompt":"say %d","max_tokens":20,"adapter":"%c"}\n' % (n, b"abc"[n % 3])
            for n in range(LINES)
        )
        batch_id = bulk.submit(data)
        deadline = time.monotonic() + 40
        while bulk.state(batch_id).done < KILL_AT:
            assert time.monotonic() < deadline, bulk.state(batch_id)
            time.sleep(0.05)
        assert bulk.state(batch_id).done < LINES, "it was over before the kill"
        kill(bulk)
        state = bulk.wait_over(batch_id, timeout_s)
        assert (state.status, state.total, state.done, state.failed) == (
            "completed",
            LINES,
            LINES,
            0,
        )
        results = [json.loads(line) for line in bulk.results(batch_id)]
        assert [result["line"] for result in results] == list(range(1, LINES + 1))
        assert all(result["usage"]["completion_tokens"] == 20 for result in results)
        assert sum(bulk.states.adapter_progress(batch_id).values()) == LINES


def kill_producer(bulk: BulkSystem) -> None:
    bulk.kill_producers()
    bulk.start_producer()


def kill_worker(bulk: BulkSystem) -> None:
    [worker] = bulk.system.workers
    worker.signal(signal.SIGKILL)
    worker.wait()
    bulk.start_worker("scripted:200")


def drain_worker(bulk: BulkSystem) -> None:
    [worker] = bulk.system.workers
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    bulk.start_worker("scripted:200")


def kill_engine(bulk: BulkSystem) -> None:
    import psutil

    [worker] = bulk.system.workers
    psutil.Process(worker.process.pid).children()[0].kill()
    assert worker.wait() == 1
    bulk.start_worker("scripted:200")


def kill_gateway(bulk: BulkSystem) -> None:
    """Nothing of a batch goes through it once it is made."""
    bulk.gateway.process.kill()


def kill_broker(bulk: BulkSystem) -> None:
    """It kept all in memory: lines under way and answers not yet collected are gone."""
    bulk.broker.kill()
    bulk.broker.start()


def kill_redis(bulk: BulkSystem) -> None:
    bulk.redis.kill()
    time.sleep(1)
    bulk.redis.start()


@pytest.mark.long
def test_the_producer_is_killed(tmp_path: Path) -> None:
    run_with(tmp_path, kill_producer, 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill", [kill_worker, drain_worker, kill_engine, kill_gateway, kill_broker, kill_redis]
)
def test_another_process_is_killed(kill: Callable[[BulkSystem], None], tmp_path: Path) -> None:
    run_with(tmp_path, kill, 120)


@pytest.mark.slow
def test_two_producers_share_the_work(tmp_path: Path) -> None:
    run_with(tmp_path, lambda bulk: (bulk.start_producer(), None)[1], 60)
