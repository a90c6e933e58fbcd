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
from openlora.protocol.status import Heartbeat, PartitionStatus
from workers.config import WorkerConfig
from workers.messages import Load, ModelFacts

if TYPE_CHECKING:
    from workers.assembly import Parts

HEARTBEAT_INTERVAL_S = 1.0

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
            resident_adapters=load.resident_adapters,
            tokens_per_s=round(rate, 1),
            max_lora_rank=self.facts.max_lora_rank,
            hidden_size=self.facts.hidden_size,
            attention_backend=self.facts.attention_backend,
        )


class Heartbeats:
    """Writes the heartbeat when it is due; Redis being away only leaves it out."""

    def __init__(self, writer: HeartbeatWriter, parts: Parts) -> None:
        self._writer = writer
        self._parts = parts
        self._due = 0.0

    def write_if_due(self, *, ready: bool) -> None:
        """Once a second; ready is said only while partitions are owned."""
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
            ready=ready and bool(partitions),
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
