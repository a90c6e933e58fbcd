"""What a worker does when its engine has died and it has not: tell who was inside, hand jobs over.

Handing over is quicker than the group: its partitions are given to others only after a rebalance,
seconds on some brokers. So the jobs are published once more, straight to partitions that a living
worker owns, and their old messages are committed. Whoever claims a job has it; a job that comes
twice is claimed twice, which costs one prefill.
"""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Sequence
from typing import Any

import redis
from kafka import KafkaProducer
from kafka.errors import KafkaError

from openlora.errors import Overloaded
from openlora.joblog import JobLog
from openlora.joblog.crashes import CrashLog, Suspicion
from openlora.protocol.crashes import Crash
from openlora.protocol.jobs import AdapterRef
from openlora.protocol.names import JOBS_TOPIC
from workers.assembly import Parts
from workers.offsets import Partition
from workers.run import now_ms

PUBLISH_TIMEOUT_S = 2.0
_FROM_OUTSIDE = frozenset(
    -number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
)

logger = logging.getLogger("workers.aftermath")


def is_crash(status: int | None) -> bool:
    """Whether the engine's end was its own doing, and not a signal from outside or its parent's
    end. What kills for want of memory is outside too."""
    return status is not None and status != 0 and status not in _FROM_OUTSIDE


def how_it_died(status: int) -> str:
    """ "SIGSEGV" or "status 1"."""
    return signal.Signals(-status).name if status < 0 else f"status {status}"


class Aftermath:
    """One dead engine's; used by the loop's thread, which runs nothing any more."""

    def __init__(self, parts: Parts, client: redis.Redis) -> None:
        self._parts = parts
        self._crashes = CrashLog(client, parts.config.quarantine_s)
        self._job_log = JobLog(client)

    def run(self, status: int | None, pins: Sequence[str] = ()) -> None:
        """Everything there is to do before the group is left. Never waits for long.

        ``pins``: content of pinned adapters that were on their way into its pages.
        """
        try:
            if status is not None and is_crash(status):
                self._accuse(status, pins)
            self._hand_over()
        except Overloaded as error:
            logger.warning("event=aftermath_cut_short error=%r next=leave_group", error.message)
        except KafkaError as error:
            logger.warning("event=hand_over_failed error=%r next=leave_group", error)

    def _accuse(self, status: int, pins: Sequence[str]) -> None:
        loop = self._parts.loop
        inside = loop.runs_in_engine()
        jobs = len(inside) + loop.bulk_lines_in_engine
        worker_id = self._parts.config.worker_id
        crash = Crash(int(now_ms()), worker_id, how_it_died(status), jobs)
        if pins and not jobs:
            for content in self._crashes.pins_died(pins, crash.how):
                logger.warning("event=pin_quarantined adapter=%s how=%s", content, crash.how)
            return
        suspicions = self._crashes.crashed([run.job.job_id for run in inside], crash)
        logger.warning("event=jobs_suspected jobs=%d how=%s next=run_alone", jobs, crash.how)
        for run, suspicion in zip(inside, suspicions, strict=True):
            if suspicion.is_deadly:
                loop.condemn(run, suspicion)
                self._accuse_adapters(run.job.job_id, run.job.adapters, suspicion)
        for bundle, lines in self._parts.bulk.inside().items():
            # Whoever runs the bundle next knows from it what to run alone, and what not at all.
            found = self._crashes.lines_crashed(bundle.batch_id, lines, crash)
            for line, suspicion in found.items():
                if suspicion.is_deadly:
                    adapters = bundle.message.group.adapters
                    self._accuse_adapters(bundle.job_id(line), adapters, suspicion)

    def _accuse_adapters(
        self, job_id: str, adapters: Sequence[AdapterRef], suspicion: Suspicion
    ) -> None:
        for adapter in adapters:
            reason = (
                f"adapter {adapter.id!r} version {adapter.version} is quarantined: different jobs "
                f"with it ended the engine ({suspicion.story[-1].how}); register a mended one"
            )
            if self._crashes.adapter_died(adapter.hash, job_id, reason):
                logger.warning("event=adapter_quarantined adapter=%s", adapter.id)

    def _hand_over(self) -> None:
        places = self._places_of_others()
        work = self._parts.loop.open_work()
        if not places or not work:
            logger.info("event=nothing_handed_over jobs=%d places=%d", len(work), len(places))
            return
        producer: Any = KafkaProducer(
            bootstrap_servers=self._parts.config.kafka.split(","),
            acks="all",
            enable_idempotence=False,
            delivery_timeout_ms=int(PUBLISH_TIMEOUT_S * 1000),
            request_timeout_ms=int(PUBLISH_TIMEOUT_S * 500),
            max_block_ms=int(PUBLISH_TIMEOUT_S * 1000),
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )
        sent = [
            (producer.send(topic, value, partition=partition), positions)
            for (value, positions), (topic, partition) in zip(
                work, itertools.cycle(places), strict=False
            )
        ]
        handed_over = 0
        for future, positions in sent:
            try:
                future.get(PUBLISH_TIMEOUT_S)
            except KafkaError as error:
                logger.warning("event=job_not_handed_over error=%r next=rebalance", error)
                continue
            handed_over += 1
            for position in positions:
                self._parts.consumer.end(position, None)
        producer.close(timeout=0)
        logger.warning("event=handed_over jobs=%d of=%d next=leave_group", handed_over, len(work))

    def _places_of_others(self) -> Sequence[Partition]:
        """Partitions of the interactive topic that living workers own, one worker in turn."""
        by_worker = [
            [(s.topic, s.partition) for s in heartbeat.partitions if s.topic == JOBS_TOPIC]
            for heartbeat in self._job_log.heartbeats()
            if heartbeat.ready and heartbeat.id != self._parts.config.worker_id
        ]
        rounds = itertools.zip_longest(*by_worker)
        return [place for places in rounds for place in places if place is not None]
