"""A whole system for ``bench bulk``: that of ``bench chaos``, with a producer and batches."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from openlora.bench.chaos_system import ChaosPlan, ChaosSystem, Process
from openlora.errors import InternalError
from openlora.joblog import redis_client
from openlora.local import ServerProcess, ServerSpec, free_port
from openlora.local.probes import kafka_answers
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from producer.bulk.files import FileStore
from producer.bulk.records import BatchState
from producer.bulk.state import BatchStates

BROKER_START_S = 60.0
STUCK_S = 120.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class BulkPlan:
    """What to start.

    Attributes:
        engine: a worker's ``--engine``.
        kafka: program that runs a broker which keeps its messages, called with a data directory
            and a port; None: the embedded one, which keeps all in memory.
    """

    workers: int
    engine: str
    kafka: Path | None = None


class BulkSystem(ChaosSystem):
    """Broker, Redis, gateway, workers and a producer on free ports."""

    def __init__(self, folder: Path, plan: BulkPlan) -> None:
        batches = folder / "batches"
        self.own_broker = None if plan.kafka is None else _broker(plan.kafka, folder / "kafka")
        super().__init__(
            folder,
            ChaosPlan(
                workers=plan.workers,
                gateways=1,
                engine=plan.engine,
                gateway_environ={"OPENLORA_BATCHES": str(batches), "OPENLORA_LOG_LEVEL": "warning"},
                worker_flags=("--log-level", "warning"),
            ),
            self.own_broker,
        )
        environ = {
            "OPENLORA_KAFKA": self.broker.address,
            "OPENLORA_REDIS": self.redis.address,
            "OPENLORA_BATCHES": str(batches),
        }
        log = folder / "producer.log"
        self.producer = Process("producer", ["openlora", "producer"], environ, log)
        self.client = redis_client(self.redis.address)
        self.states = BatchStates(self.client)
        self.store = FileStore(batches, self.client)
        self.peak_mb: dict[str, float] = {}

    def start(self) -> None:
        """Everything, up to ready workers."""
        if self.own_broker is not None:
            self.own_broker.start(BROKER_START_S)
        super().start()
        self.producer.start()

    def stop(self) -> None:
        """End everything that this started."""
        self.producer.signal(signal.SIGKILL)
        self.producer.end(timeout_s=1)
        super().stop()
        if self.own_broker is not None:
            self.own_broker.stop()
        self.client.close()

    def register(self, count: int) -> None:
        """Adapters "a0", "a1", …: names alone, as the scripted engine loads none."""
        registry = AdapterRegistry(self.client)
        for number in range(count):
            adapter_id = f"a{number}"
            # "0": never one that the scripted engine takes for poison
            digest = "0" + hashlib.sha256(adapter_id.encode()).hexdigest()[1:]
            (self.folder / "store" / digest).mkdir(parents=True)
            registry.put(AdapterRecord(adapter_id, 0, digest, 8, ("q_proj",), "", 1, "bench", 1))

    def submit(self, *words: str) -> subprocess.Popen[bytes]:
        """``openlora batch submit …``, running; its input and output are pipes."""
        argv = [sys.executable, "-P", "-m", "openlora", "batch", "submit", *words]
        return subprocess.Popen(
            [*argv, "--url", self.urls()[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ),
        )

    def state(self, batch_id: str) -> BatchState:
        """The batch as it is now."""
        state = self.states.get(batch_id)
        if state is None:
            raise InternalError(f"batch {batch_id} is gone")
        return state

    def watch(self, batch_id: str, lines_done: int) -> BatchState:
        """Wait until so many lines are done, or the batch is over; sizes are taken meanwhile.

        Raises:
            InternalError: nothing moved for ``STUCK_S``.
        """
        seen, moved_at = -1, time.monotonic()
        while True:
            self.measure()
            state = self.state(batch_id)
            if state.phase == "over" or (state.phase != "reading" and state.done >= lines_done):
                return state
            progress = state.done + state.line + state.part
            if progress != seen:
                seen, moved_at = progress, time.monotonic()
            elif time.monotonic() - moved_at > STUCK_S:
                raise InternalError(f"the batch stands still: {state}\n{self.last_lines()}")
            self.keep()
            time.sleep(_POLL_S)

    def keep(self) -> None:
        """Start again what has died, as ``openlora up`` does."""
        for process in (*self.workers, *self.gateways, self.producer):
            if not process.running:
                process.start()

    def measure(self) -> None:
        """Note how large the processes are."""
        pids = {process.name: process.pid for process in (*self.workers, *self.gateways)}
        pids["producer"] = self.producer.pid
        for name, server in (("broker", self.broker), ("redis", self.redis)):
            if server.pid is not None:
                pids[name] = server.pid
        for worker in self.workers:
            engine = worker.engine_pid()
            if engine is not None:
                pids[f"{worker.name} engine"] = engine
        for name, pid in pids.items():
            with suppress(psutil.Error):
                size = psutil.Process(pid).memory_info().rss / 1e6
                self.peak_mb[name] = max(self.peak_mb.get(name, 0.0), size)


def _broker(program: Path, data_dir: Path) -> ServerProcess:
    data_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    spec = ServerSpec(
        name=program.name,
        argv=(str(program), str(data_dir / "data"), str(port)),
        port=port,
        address=f"127.0.0.1:{port}",
        is_ready=partial(kafka_answers, "127.0.0.1", port),
    )
    return ServerProcess(spec, data_dir / "broker.log")
