"""kill -9 of each process of a running batch; who keeps the system starts it again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from openlora.bench.bulk_lines import Lines
from openlora.bench.bulk_system import BROKER_START_S, BulkSystem
from openlora.errors import InternalError

Kill = Callable[[BulkSystem], None]

OUTAGE_S = 1.0


def half_a_submission(system: BulkSystem, lines: Lines) -> None:
    """kill -9 a submitting command in the middle of its file: no batch may come of it.

    Raises:
        InternalError: one did.
    """
    command = system.submit("-")
    assert command.stdin is not None
    parts = list(lines.parts())
    command.stdin.writelines(parts[: max(1, len(parts) // 2)])
    command.stdin.flush()
    time.sleep(OUTAGE_S)
    command.kill()
    with suppress(BrokenPipeError):
        command.stdin.close()
    command.wait()
    time.sleep(OUTAGE_S)
    if system.states.open_ids():
        raise InternalError("a batch was made of half a file")


def kill_producer(system: BulkSystem) -> None:
    """The Celery worker, with the collector of answers in it."""
    system.producer.signal(signal.SIGKILL)
    system.wait_until(lambda: not system.producer.running, 10)


def kill_worker_io(system: BulkSystem) -> None:
    """A worker's I/O process; its engine ends with it."""
    system.workers[0].signal(signal.SIGKILL)
    system.wait_until(lambda: not system.workers[0].running, 10)


def kill_engine(system: BulkSystem) -> None:
    """A worker's engine; the I/O process leaves the group and ends."""
    worker = system.workers[-1]
    system.wait_until(lambda: worker.engine_pid() is not None, 30)
    pid = worker.engine_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    system.wait_until(lambda: not worker.running, 30)


def kill_gateway(system: BulkSystem) -> None:
    """Nothing of a batch goes through it once it is made."""
    system.gateways[0].signal(signal.SIGKILL)
    system.wait_until(lambda: not system.gateways[0].running, 10)


def kill_broker(system: BulkSystem) -> None:
    """The embedded one comes back empty: lines under way and answers not collected are gone."""
    system.broker.kill()
    time.sleep(OUTAGE_S)
    system.broker.start(BROKER_START_S)


def kill_redis(system: BulkSystem) -> None:
    """It comes back with what it had acknowledged."""
    system.redis.kill()
    time.sleep(OUTAGE_S)
    system.redis.start()


KILLS: dict[str, Kill] = {
    "producer (Celery worker, collector)": kill_producer,
    "worker I/O": kill_worker_io,
    "engine": kill_engine,
    "gateway": kill_gateway,
    "broker": kill_broker,
    "Redis": kill_redis,
}
