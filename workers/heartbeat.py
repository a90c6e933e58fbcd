"""What this worker tells the others of itself, once a second."""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from openlora.errors import Overloaded
from openlora.joblog import JobLog
from openlora.protocol.status import Heartbeat, PartitionStatus
from workers.config import WorkerConfig
from workers.messages import Load, ModelFacts

if TYPE_CHECKING:
    from workers.assembly import Parts

HEARTBEAT_INTERVAL_S = 1.0
LOADING_INTERVAL_S = 0.2

logger = logging.getLogger("workers.heartbeat")


@dataclass(slots=True)
class HeartbeatWriter:
    """Builds heartbeats; keeps what the token rate is measured against."""

    config: WorkerConfig
    facts: ModelFacts
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    _tokens_before: int = 0
    _measured_at: float = field(default_factory=time.monotonic)

    def build(
        self,
        partitions: tuple[PartitionStatus, ...],
        load: Load,
        tokens_logged: int,
        *,
        ready: bool,
        loaded: float = 1.0,
    ) -> Heartbeat:
        """The heartbeat of this moment; the rate is that since the last call."""
        now = time.monotonic()
        elapsed = now - self._measured_at
        rate = (tokens_logged - self._tokens_before) / elapsed if elapsed > 0 else 0.0
        self._tokens_before, self._measured_at = tokens_logged, now
        return Heartbeat(
            id=self.config.worker_id,
            pid=os.getpid(),
            engine_pid=self.facts.pid,
            host=socket.gethostname(),
            device=self.facts.device,
            dtype=self.facts.dtype,
            model=self.config.model,
            model_id=Path(self.config.model).name,
            max_model_len=self.facts.max_model_len,
            ready=ready,
            started_ms=self.started_ms,
            written_ms=time.time_ns() // 1_000_000,
            partitions=partitions,
            running=load.running,
            waiting=load.waiting,
            waiting_batch=load.waiting_batch,
            resident_adapters=load.resident_adapters,
            tokens_per_s=round(rate, 1),
            max_lora_rank=self.facts.max_lora_rank,
            hidden_size=self.facts.hidden_size,
            attention_backend=self.facts.attention_backend,
            loaded=round(loaded, 3),
            tiers=load.tiers,
        )


class LoadingHeartbeats:
    """Shows the worker while its model loads; called with the share that is loaded."""

    def __init__(self, config: WorkerConfig, engine_pid: int, job_log: JobLog) -> None:
        unknown = ModelFacts(engine_pid, config.device, config.dtype, 0, 0, (), 0, 0, "")
        self._writer = HeartbeatWriter(config, unknown)
        self._job_log = job_log
        self._due = 0.0

    def __call__(self, share: float) -> None:
        """Write one, unless the last is too fresh."""
        now = time.monotonic()
        if now < self._due and share < 1:
            return
        self._due = now + LOADING_INTERVAL_S
        heartbeat = self._writer.build((), Load(0, 0, ()), 0, ready=False, loaded=share)
        try:
            self._job_log.write_heartbeat(heartbeat)
        except Overloaded as error:
            logger.info("event=heartbeat_missed error=%r next=with_progress", error.message)


class Heartbeats:
    """Writes the heartbeat when it is due; Redis being away only leaves it out."""

    def __init__(self, writer: HeartbeatWriter, parts: Parts) -> None:
        self._writer = writer
        self._parts = parts
        self._due = 0.0

    def write_if_due(self, *, ready: bool) -> None:
        """Once a second; ready is said only as a member of the group, which may be one more than
        there are partitions: it has none then, and stands by."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + HEARTBEAT_INTERVAL_S
        parts = self._parts
        partitions = parts.consumer.status
        heartbeat = self._writer.build(
            partitions,
            parts.loop.load,
            parts.sink.tokens_logged,
            ready=ready and parts.consumer.joined,
        )
        try:
            parts.job_log.write_heartbeat(heartbeat)
        except Overloaded as error:
            logger.info("event=heartbeat_missed error=%r next=in_a_second", error.message)

    def remove(self) -> None:
        """This worker leaves on purpose."""
        try:
            self._parts.job_log.remove_heartbeat(self._parts.config.worker_id)
        except Overloaded as error:
            logger.info("event=heartbeat_left error=%r next=expires", error.message)
