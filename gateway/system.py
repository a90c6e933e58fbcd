"""What the gateway is made of, how it starts, drains and stops.

Start: Redis client → adapter directory and relay tasks → broker client → sweeper. Nothing waits
for the others to be up: `/readyz` says what is missing, and requests get `overloaded` meanwhile.
Stop: refuse new jobs → let streams end (up to the drain timeout) → close websockets with 1012 →
publisher, so that what was promised to it is sent → tasks → Redis client. A call that still looks
for a lost broker is in a daemon thread and not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from gateway.adapter_collector import AdapterCollector
from gateway.auth import KeyPolicy
from gateway.broker_watch import BrokerWatch
from gateway.config import GatewayConfig
from gateway.connection import Connection
from gateway.directory import AdapterDirectory
from gateway.follower import FrameWriter
from gateway.intake import Intake
from gateway.keys import RateLimits
from gateway.limits import InFlight
from gateway.metrics import Metrics
from gateway.quarantine import Quarantine
from gateway.queue_estimate import QueueEstimate
from gateway.registration import Registrar
from gateway.relay import Relay
from gateway.remote_adapters import RemoteAdapters
from gateway.tasks import end_tasks
from gateway.threads import in_daemon_thread
from openlora.adapters.stores import open_store
from openlora.errors import Overloaded, SetupError
from openlora.joblog import AsyncJobLog, async_redis_client
from openlora.joblog.hints import AsyncHints
from openlora.protocol.names import JOB_TOPICS, SHARD_COUNT
from openlora.protocol.status import Heartbeat
from producer.group_offsets import read_group_offsets
from producer.publisher import Publisher
from producer.sweeper import Sweeper
from producer.topics import (
    PartitionRow,
    TopicKeeper,
    describe_partitions,
    partitions_without_owner,
)

log = logging.getLogger(__name__)

_DRAIN_CHECK_S = 0.1
_STALL_CHECK_S = 5.0
_QUEUE_CHECK_S = 1.0
STALL_S = 60.0
"""A client that took nothing for so long is treated as gone; it can resume its jobs."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """``waiting_for``: kafka, redis, worker, gateway, or nothing. ``starting``: workers that load
    their model or join the group."""

    waiting_for: tuple[str, ...]
    starting: tuple[Heartbeat, ...] = ()


class Gateway:
    """One gateway: everything that HTTP and websockets share. Made and used on one event loop."""

    def __init__(self, config: GatewayConfig, topics: TopicKeeper, publisher: Publisher) -> None:
        self.config = config
        self.metrics = Metrics()
        self.publisher = publisher
        self.broker = BrokerWatch(topics)
        self.redis = async_redis_client(config.redis)
        self.job_log = AsyncJobLog(self.redis)
        self.directory = AdapterDirectory(self.redis)
        self.quarantine = Quarantine(self.redis)
        self.rates = RateLimits(self.redis)
        self._queue = QueueEstimate(config.max_wait_s)
        shard = secrets.randbelow(SHARD_COUNT)
        lease_ms = round(config.disconnect_grace_s * 1000)
        self.relay = Relay(self.job_log, shard, lease_ms, self.metrics)
        self._in_flight = InFlight(self.redis, config.max_tenant_jobs, config.max_adapter_jobs)
        self.intake = Intake(
            self.job_log,
            publisher,
            self.directory,
            self.quarantine,
            self._in_flight,
            self._queue,
            self.rates,
            self.metrics,
            AsyncHints(self.redis),
            shard=shard,
            lease_ms=lease_ms,
        )
        owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.store = open_store(config.store, config.adapter_cache)
        self._collector = AdapterCollector(
            self.directory.registry, self.job_log, self.redis, self.store
        )
        self.registrar = Registrar(self)
        remote = RemoteAdapters(self.directory, self.registrar, config.remote_adapters)
        self.directory.remote = remote.get
        self._sweeper = Sweeper(self.job_log, publisher, self.broker, owner)
        self._connections: set[Connection] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.on_failure: Callable[[], None] = lambda: None
        self.failed = False

    def start(self) -> None:
        """Starts the background tasks. One that fails sets ``failed`` and calls ``on_failure``."""
        for work in (
            self.directory.run(),
            self.relay.run(),
            self.relay.renew_leases(),
            self.broker.run(),
            self._sweeper.run(),
            self._collector.run(),
            self._drop_stalled(),
            self._watch_queue(),
        ):
            self._run(work)

    async def readiness(self) -> Readiness:
        """What is missing before a request can be answered."""
        missing = [] if self.broker.answers else ["kafka"]
        if self.intake.draining:
            missing.append("gateway (this one is draining)")
        try:
            heartbeats = await self.job_log.heartbeats()
        except Overloaded:
            return Readiness((*missing, "redis"))
        if not any(heartbeat.ready for heartbeat in heartbeats):
            missing.append("worker")
        return Readiness(tuple(missing), tuple(h for h in heartbeats if not h.ready))

    async def partition_rows(self) -> list[PartitionRow]:
        """Every partition of the job topics; owners and lag come from the workers' heartbeats.

        Raises:
            Overloaded: Redis does not answer.
        """
        heartbeats = await self.job_log.heartbeats()
        counts = {t: n for t, n in self.broker.partitions.items() if t in JOB_TOPICS}
        unowned = partitions_without_owner(counts, heartbeats)
        try:
            offsets = await in_daemon_thread(lambda: read_group_offsets(self.config.kafka, unowned))
        except SetupError as error:
            log.warning("offsets of partitions without owner are not known: %s", error.message)
            offsets = {}
        return describe_partitions(counts, heartbeats, offsets)

    async def drain(self) -> None:
        """Refuses new jobs and waits until the streams have ended, or the drain timeout is over."""
        self.intake.draining = True
        deadline = time.monotonic() + self.config.drain_timeout_s
        log.info("draining: %d streams may end within the timeout", self.relay.live_streams)
        while self.relay.live_streams and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_CHECK_S)
        if self.relay.live_streams:
            log.warning(
                "%d streams are cut off; their clients can resume them at another gateway",
                self.relay.live_streams,
            )

    async def stop(self) -> None:
        """Closes everything; connections are closed already."""
        await asyncio.to_thread(self.publisher.close)
        await end_tasks(self._tasks)
        await self.redis.aclose()

    async def serve(
        self, receive: Receive, writer: FrameWriter, tenant: str, policy: KeyPolicy
    ) -> None:
        """Runs one accepted websocket until it is closed."""
        connection = Connection(
            receive,
            writer,
            tenant=tenant,
            policy=policy,
            job_log=self.job_log,
            intake=self.intake,
            relay=self.relay,
            metrics=self.metrics,
        )
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    async def _watch_queue(self) -> None:
        """Keeps the estimate of what waits; while Redis is away it stays as it was."""
        while True:
            with contextlib.suppress(Overloaded):
                heartbeats = await self.job_log.heartbeats()
                arrived = await self._in_flight.arrive(0)
                self._queue.update(heartbeats, time.monotonic(), arrived)
            await asyncio.sleep(_QUEUE_CHECK_S)

    async def _drop_stalled(self) -> None:
        """Gives up clients that do not read: their jobs would hold an engine for nobody."""
        while True:
            await asyncio.sleep(_STALL_CHECK_S)
            for connection in [*self._connections]:
                if connection.stalled_s() > STALL_S:
                    log.warning("a client took nothing for %g s and is given up", STALL_S)
                    connection.abandon()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._task_done)
        self._tasks.append(task)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        """Background tasks end only when they are cancelled. A gateway that lacks one would accept
        work and not stream it: it is better started anew, and its clients resume."""
        if not task.cancelled():
            log.critical("a background task failed: the gateway ends", exc_info=task.exception())
            self.failed = True
            self.on_failure()
