"""Hop 2: a draft becomes a job that cannot be lost, and only then is it accepted.

Stored in Redis, then published to Kafka, then acknowledged by the broker, in that order: whatever
dies in between, a job whose client was told `accepted` exists in both or can be published again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import Future
from typing import Protocol

from gateway.auth import ANYTHING, KeyPolicy
from gateway.directory import AdapterDirectory
from gateway.drafts import JobDraft, job_of
from gateway.keys import RateLimits
from gateway.limits import InFlight
from gateway.metrics import Metrics
from gateway.quarantine import Quarantine
from gateway.queue_estimate import QueueEstimate
from openlora.errors import DeadlineExceeded, OpenLoRAError, Overloaded
from openlora.joblog import AsyncJobLog
from openlora.joblog.hints import AsyncHints
from openlora.protocol.jobs import AdapterRef, Job
from openlora.protocol.names import new_job_id
from openlora.registry.records import is_remote
from openlora.sampling_params import SEED_LIMIT

log = logging.getLogger(__name__)

RETRY_AFTER_MS = 1000
_FIRST_TIMEOUT_S = 6.0
"""A publish that is under way has come to an end before."""
_FIRST_CHECK_S = 0.05


class JobPublisher(Protocol):
    """What the intake needs of ``producer.publisher.Publisher``."""

    def publish(self, job: Job) -> Future[tuple[str, int, int]]:
        """Sends the job; the future gives (topic, partition, offset) once acknowledged."""


class Intake:
    """Makes jobs on this gateway's delivery shard."""

    def __init__(
        self,
        job_log: AsyncJobLog,
        publisher: JobPublisher,
        directory: AdapterDirectory,
        quarantine: Quarantine,
        in_flight: InFlight,
        queue: QueueEstimate,
        rates: RateLimits,
        metrics: Metrics,
        hints: AsyncHints,
        *,
        shard: int,
        lease_ms: int,
    ) -> None:
        self._log = job_log
        self._publisher = publisher
        self._directory = directory
        self._quarantine = quarantine
        self._in_flight = in_flight
        self._queue = queue
        self._rates = rates
        self._metrics = metrics
        self._hints = hints
        self._shard = shard
        self._lease_ms = lease_ms
        self.draining = False
        self._marks: set[asyncio.Task[None]] = set()

    async def prepare(self, draft: JobDraft, tenant: str, policy: KeyPolicy = ANYTHING) -> Job:
        """The job of ``draft``, its adapters resolved; nothing is stored yet.

        Raises:
            Forbidden, RateLimited: the key may not use an adapter, or asks too often.
            UnknownAdapter: an adapter is not registered.
            DeadlineExceeded: one that is named by URL takes too long.
            Overloaded: the gateway is about to stop, too much waits, or Redis does not answer.
        """
        if self.draining:
            raise Overloaded(
                "this gateway is shutting down; connect again and send the request there",
                retry_after_ms=RETRY_AFTER_MS,
            )
        for choice in draft.adapters:
            policy.check_adapter(choice.id.partition("@")[0])
        self._queue.take(draft.deadline_s, time.monotonic())
        await self._rates.take(policy)
        created_ms = time.time_ns() // 1_000_000
        adapters = await self._resolve(draft, tenant)
        return job_of(
            draft,
            job_id=new_job_id(self._shard),
            tenant=tenant,
            created_ms=created_ms,
            seed=secrets.randbelow(SEED_LIMIT),
            adapters=adapters,
        )

    async def _resolve(self, draft: JobDraft, tenant: str) -> tuple[AdapterRef, ...]:
        """An adapter that is named by URL is fetched first, for as long as the deadline lets it."""
        if not any(is_remote(choice.id) for choice in draft.adapters):
            return await self._directory.resolve(draft.adapters, tenant)
        try:
            async with asyncio.timeout(draft.deadline_s):
                return await self._directory.resolve(draft.adapters, tenant)
        except TimeoutError as error:
            raise DeadlineExceeded(
                "the deadline passed while an adapter named by URL was fetched, which goes on: a "
                "later request finds it"
            ) from error

    async def commit(self, job: Job, draft: JobDraft | None = None) -> str:
        """Stores and publishes ``job``; returns its ID once the broker has acknowledged it.

        Where its draft's idempotency key was used before, ``job`` is dropped and the ID of the
        first job is returned, also once the broker has acknowledged that one.

        Raises:
            InvalidRequest: the key was used with another request.
            AdapterFailed: an adapter is quarantined.
            Overloaded: too much waits, Redis or the broker does not take the job, or its tenant has
                too many under way (with an adapter); it is not accepted.
        """
        started = time.monotonic()
        try:
            # Side by side: each is a round trip, and the first token waits for all of them.
            await asyncio.gather(
                self._log.store(job, self._lease_ms),
                self._in_flight.reserve(job),
                self._quarantine.check(job.adapters),
                self._join_line(draft),
            )
            first_job_id = await self._first_with_key(job, draft)
            if first_job_id != job.job_id:
                await self._log.discard(job.job_id)
                await self._wait_for_first(first_job_id, job.tenant, draft)
                return first_job_id
            where = await asyncio.wrap_future(self._publisher.publish(job))
        except OpenLoRAError:
            await self._take_back(job, None if draft is None else draft.idempotency_key)
            raise
        self._metrics.accept.observe(time.monotonic() - started)
        self._metrics.jobs.labels("accepted").inc()
        # Nobody waits for it: `accepted`, and with it the first token, would come later.
        mark = asyncio.create_task(self._mark(job.job_id, where))
        self._marks.add(mark)
        mark.add_done_callback(self._marks.discard)
        return job.job_id

    async def _join_line(self, draft: JobDraft | None) -> None:
        """Be counted by all gateways; Overloaded where too much waits by what they have taken."""
        arrived = await self._in_flight.arrive()
        try:
            deadline_s = None if draft is None else draft.deadline_s
            self._queue.counted(arrived, deadline_s, time.monotonic())
        except Overloaded:
            await self._in_flight.arrive(-1)
            raise

    async def _mark(self, job_id: str, where: tuple[str, int, int]) -> None:
        await self._hints.say()
        try:
            await self._log.mark_published(job_id, *where)
        except Overloaded as error:
            # The sweeper publishes it once more then, and the second claim finds it taken.
            log.warning("job %s: not marked as published: %s", job_id, error)

    async def _first_with_key(self, job: Job, draft: JobDraft | None) -> str:
        key = None if draft is None else draft.idempotency_key
        if draft is None or key is None:
            return job.job_id
        job_id, _ = await self._log.claim_idempotency(job.tenant, key, draft.digest, job.job_id)
        return job_id

    async def _wait_for_first(self, job_id: str, tenant: str, draft: JobDraft | None) -> None:
        """The key's first request may be on its way still, for a client that lost its connection
        and asks again: if it is refused there, nobody may have been told `accepted` here.

        Whoever refused it may have died, or lost Redis, before the key was free again."""
        deadline = time.monotonic() + _FIRST_TIMEOUT_S
        while (acceptance := await self._log.acceptance(job_id)) == "stored":
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_FIRST_CHECK_S)
        if acceptance == "discarded" and draft is not None and draft.idempotency_key is not None:
            await self._log.release_idempotency(tenant, draft.idempotency_key, job_id)
        if acceptance in ("stored", "discarded"):
            raise Overloaded(
                "the first request with this idempotency_key was not accepted; try again",
                retry_after_ms=RETRY_AFTER_MS,
            )

    async def _take_back(self, job: Job, key: str | None) -> None:
        """The job was not accepted: no worker may run it and its key is free again."""
        try:
            await self._log.discard(job.job_id)
            await self._in_flight.release(job)
            if key is not None:
                await self._log.release_idempotency(job.tenant, key, job.job_id)
        except Overloaded as error:
            # Nobody renews its lease, so it is cancelled after the grace time.
            log.warning("job %s: refused, but still in the log: %s", job.job_id, error)
