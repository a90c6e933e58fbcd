"""A whole system for batches: broker, Redis, scripted worker, producer and gateway processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from openlora.local import ServerProcess
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from producer.bulk.files import FileStore
from producer.bulk.records import BatchState
from producer.bulk.state import BatchStates
from tests.gateway.running import RunningGateway, running_gateway
from tests.services import start_broker, start_redis
from tests.workers.running import System, Worker

MODEL = "model"


@dataclass
class BulkSystem:
    """Everything that a batch goes through, each a process that a test may kill."""

    system: System
    gateway: RunningGateway
    broker: ServerProcess
    redis: ServerProcess
    directory: Path
    producers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.states = BatchStates(self.system.redis)
        self.store = FileStore(self.directory / "batches", self.system.redis)

    def start_worker(self, engine: str = "scripted:500", *flags: str) -> Worker:
        return self.system.start_worker("--engine", engine, *flags)

    def start_producer(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "openlora", "producer", "--log-level", "warning"]
        argv += ["--kafka", self.system.kafka, "--redis", self.system.redis_url]
        argv += ["--partitions", "4", "--batches", str(self.directory / "batches")]
        with self.producer_log.open("ab") as log:
            self.producers.append(subprocess.Popen(argv, stdout=log, stderr=log))
        return self.producers[-1]

    @property
    def producer_log(self) -> Path:
        return self.directory / "producer.log"

    def register(self, *ids: str) -> None:
        """Adapters with an empty directory in the store: the scripted engine loads none."""
        registry = AdapterRegistry(self.system.redis)
        for adapter_id in ids:
            # never one that the scripted engine takes for poison
            digest = "0" + hashlib.sha256(adapter_id.encode()).hexdigest()[1:]
            (self.directory / "store" / digest).mkdir(parents=True)
            registry.put(AdapterRecord(adapter_id, 0, digest, 8, ("q_proj",), "", 1, "test", 1))

    def submit(self, data: bytes, **fields: Any) -> str:
        """Send ``data`` and make a batch of it; → its ID."""
        with httpx.Client(base_url=self.gateway.url, timeout=30) as client:
            form = {"purpose": "batch"}
            answer = client.post("/v1/files", data=form, files={"file": ("in.jsonl", data)})
            assert answer.status_code == 200, answer.text
            new = {"input_file_id": answer.json()["id"], **fields}
            answer = client.post("/v1/batches", json=new)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["id"])

    def state(self, batch_id: str) -> BatchState:
        state = self.states.get(batch_id)
        assert state is not None
        return state

    def wait_over(self, batch_id: str, timeout_s: float = 60.0) -> BatchState:
        deadline = time.monotonic() + timeout_s
        while (state := self.state(batch_id)).phase != "over":
            assert time.monotonic() < deadline, (state, self.producer_log.read_text()[-3000:])
            time.sleep(0.05)
        return state

    def results(self, batch_id: str) -> list[bytes]:
        return b"".join(self.store.results(batch_id)).splitlines()

    def command(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """An ``openlora`` command of a user."""
        return subprocess.run(
            [sys.executable, "-m", "openlora", *words],
            env={**os.environ, "OPENLORA_URL": self.gateway.url},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def kill_producers(self) -> None:
        for producer in self.producers:
            producer.send_signal(signal.SIGKILL)
            producer.wait()
        self.producers.clear()


@contextmanager
def running_bulk(directory: Path) -> Iterator[BulkSystem]:
    """Broker, Redis and gateway run; workers and producers are the test's to start."""
    broker = start_broker("tansu", directory / "broker")
    redis = start_redis(directory / "redis")
    system = System(broker.address, redis.address, directory)
    try:
        settings = {"OPENLORA_BATCHES": str(directory / "batches"), "OPENLORA_LOG_LEVEL": "warning"}
        with running_gateway(broker.address, redis.address, directory, **settings) as gateway:
            bulk = BulkSystem(system, gateway, broker, redis, directory)
            try:
                yield bulk
            finally:
                bulk.kill_producers()
    finally:
        system.close()
        redis.stop()
        broker.stop()
