"""The benchmark's system under test: real brokers, gateway and worker, each a process."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from openlora.errors import SetupError
from openlora.local import ServerProcess, embedded_broker, embedded_redis, free_port
from openlora.local.process import die_with_parent, end_child

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Brokers:
    """The embedded broker and Redis server, running."""

    broker: ServerProcess
    redis: ServerProcess


@dataclass(frozen=True, slots=True)
class System:
    """A running system; ``processes`` are those whose CPU time is counted, by name."""

    url: str
    processes: dict[str, psutil.Process] = field(default_factory=dict)

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of each process so far."""
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: spent.user + spent.system for name, spent in times.items()}


@contextmanager
def running_brokers(directory: Path) -> Iterator[Brokers]:
    """Broker and Redis for the whole benchmark."""
    (directory / "broker").mkdir(parents=True)
    with (
        embedded_broker(directory / "broker") as broker,
        embedded_redis(directory / "redis") as redis_server,
    ):
        yield Brokers(broker, redis_server)


@contextmanager
def running_relay(brokers: Brokers, streams: int) -> Iterator[System]:
    """The bare relay."""
    port = free_port()
    arguments = ["-m", "openlora.bench.pipeline_relay", str(port)]
    arguments += [brokers.redis.address, str(streams)]
    with _child(arguments) as relay:
        _wait_for(lambda: _status(port, "/") is not None, relay, "the bare relay")
        processes = {"relay": psutil.Process(relay.pid), **_broker_processes(brokers)}
        del processes["broker"]
        yield System(f"ws://127.0.0.1:{port}/", processes)


@contextmanager
def running_system(
    brokers: Brokers, model: Path, engine: str, worker_flags: Sequence[str] = ()
) -> Iterator[System]:
    """Gateway and one worker with the given scripted engine."""
    port = free_port()
    shared = ["--kafka", brokers.broker.address, "--redis", brokers.redis.address]
    shared += ["--store", str(model / "adapters")]
    gateway_arguments = ["-m", "gateway", "--port", str(port), *shared]
    worker_arguments = ["-m", "workers", "--model", str(model), "--engine", engine, *shared]
    with _child(gateway_arguments) as gateway:
        _wait_for(lambda: _status(port, "/healthz") == 200, gateway, "the gateway")
        with _child([*worker_arguments, "--drain-timeout-s", "1", *worker_flags]) as worker:
            _wait_for(lambda: _status(port, "/readyz") == 200, worker, "the worker")
            worker_process = psutil.Process(worker.pid)
            processes = {
                "gateway": psutil.Process(gateway.pid),
                "worker I/O": worker_process,
                "worker engine": worker_process.children()[0],
                **_broker_processes(brokers),
            }
            yield System(f"ws://127.0.0.1:{port}/v1/ws", processes)


def _broker_processes(brokers: Brokers) -> dict[str, psutil.Process]:
    return {
        "broker": psutil.Process(brokers.broker.pid),
        "redis": psutil.Process(brokers.redis.pid),
    }


@contextmanager
def _child(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, *arguments],
        start_new_session=True,
        preexec_fn=die_with_parent(),
        env=dict(os.environ),
    )
    try:
        yield child
    finally:
        end_child(child, STOP_TIMEOUT_S)


def _status(port: int, path: str) -> int | None:
    """HTTP status of a GET; None while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    except http.client.BadStatusLine:
        return -1
    finally:
        connection.close()


def _wait_for(is_ready: object, child: subprocess.Popen[bytes], name: str) -> None:
    assert callable(is_ready)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not is_ready():
        if child.poll() is not None:
            raise SetupError(f"{name} ended with status {child.returncode} while starting")
        if time.monotonic() > deadline:
            raise SetupError(f"{name} is not ready after {READY_TIMEOUT_S:g} s")
        time.sleep(0.1)
