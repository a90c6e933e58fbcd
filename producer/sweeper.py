"""The sweeper: finds accepted jobs that the broker does not hold and publishes them again.

``lost_jobs.decide`` looks at facts alone; ``Sweeper`` gathers them and acts. One gateway sweeps at
a time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence, Set
from typing import Protocol

from openlora.errors import InvalidRequest, OpenLoRAError
from openlora.joblog import AsyncJobLog, JobView
from openlora.protocol.events import End, Failure
from openlora.protocol.jobs import Job
from openlora.protocol.status import Heartbeat
from producer import lost_jobs
from producer.lost_jobs import Decision, Patience, decide, with_places
from producer.publisher import Publisher

PERIOD_S = 2.0
CALM_S = 10.0
"""How long nothing is cancelled after Redis was away: leases ran out, and so did the heartbeats of
workers that run the jobs."""
SLOW_S = 1.0
"""A Redis that took longer to answer was away meanwhile, or as good as that."""
_LEAD_MS = 10_000  # a gateway that died is replaced after this

_logger = logging.getLogger(__name__)


class Topics(Protocol):
    """The broker's topics: ``ensure`` makes those that are missing; → how often any were lost."""

    async def ensure(self) -> int: ...


class Sweeper:
    """Sweeps every two seconds while it holds the lock; run by every gateway."""

    def __init__(self, log: AsyncJobLog, publisher: Publisher, topics: Topics, owner: str) -> None:
        """``owner``: a name no other gateway has."""
        self._log = log
        self._publisher = publisher
        self._topics = topics
        self._owner = owner
        self._lost: frozenset[str] = frozenset()
        self._losses = 0
        self._patience = Patience()
        self._calm_until = -math.inf

    async def run(self) -> None:
        """Until cancelled. What fails is logged and tried again in the next sweep."""
        while True:
            try:
                if await self._log.take_sweeper(self._owner, _LEAD_MS):
                    await self.sweep()
                else:
                    self._lost = frozenset()
            except OpenLoRAError as error:
                self.stay_calm()
                _logger.warning("sweep failed, the next is in %g s: %s", PERIOD_S, error.message)
            await asyncio.sleep(PERIOD_S)

    def stay_calm(self) -> None:
        """Cancel nothing for a while: what is known of leases and workers is out of date."""
        self._calm_until = time.monotonic() + CALM_S

    async def sweep(self) -> Decision:
        """Once: look at all open jobs and act. Returns what was decided.

        Raises:
            Overloaded, SetupError: Redis or Kafka does not answer.
        """
        # An in-memory broker comes back without topics, and what was in them.
        losses = await self._topics.ensure()
        topics_lost, self._losses = losses != self._losses, losses
        asked_at = time.monotonic()
        heartbeats = await self._log.heartbeats()
        if time.monotonic() - asked_at > SLOW_S:
            self.stay_calm()
        total = Decision()
        async for page in self._log.open_jobs(0 if topics_lost else lost_jobs.MIN_AGE_MS):
            decision = decide(page, heartbeats, self._lost, topics_lost)
            total.lost |= decision.lost
            total.passed |= decision.passed
            total.orphans |= decision.orphans
            total.waiting |= decision.waiting
            for name in ("republish", "cancelled", "expired"):
                getattr(total, name).extend(getattr(decision, name))
        now = time.monotonic()
        self._patience.forget_old(now)
        total.republish = self._patience.choose(total, now)
        self._lost = frozenset() if topics_lost else frozenset(total.lost)
        if now >= self._calm_until:
            await self._end(total.cancelled, None)
        await self._end(total.expired, Failure("deadline_exceeded", "the deadline passed"))
        await self._republish(total.republish, total.orphans, heartbeats)
        return total

    async def _end(self, job_ids: Sequence[str], failure: Failure | None) -> None:
        for job_id in job_ids:
            view = await self._read(job_id)
            if view is None:
                continue
            end = End(
                finish_reason="cancelled" if failure is None else None,
                failure=failure,
                completion_tokens=sum(len(chunk.tokens) for chunk in view.chunks),
                total_ms=max(0.0, time.time() * 1000 - view.job.created_ms),
            )
            if await self._log.finish(job_id, end, if_cancelled=failure is None):
                _logger.info("job %s ended here: %s", job_id, failure or "cancelled")

    async def _read(self, job_id: str) -> JobView | None:
        """The job; None where it is gone, or was written by a version that this one cannot read:
        that one alone is passed over."""
        try:
            return await self._log.read(job_id)
        except InvalidRequest as error:
            _logger.warning("job %s is passed over by the sweep: %s", job_id, error.message)
            return None

    async def _republish(
        self, job_ids: Sequence[str], orphans: Set[str], heartbeats: Sequence[Heartbeat]
    ) -> None:
        jobs: list[Job] = []
        for job_id in job_ids:
            view = await self._read(job_id)
            if view is not None and view.end is None:
                jobs.append(view.job)
        results = await asyncio.gather(
            *(
                asyncio.wrap_future(self._publisher.publish(job, partition))
                for job, partition in with_places(jobs, orphans, heartbeats)
            ),
            return_exceptions=True,
        )
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, BaseException):
                if not isinstance(result, OpenLoRAError):
                    raise result
                _logger.warning("job %s could not be published again: %s", job.job_id, result)
                continue
            _logger.warning(
                "job %s was lost with its broker or worker; published again, to %s %d @ %d",
                *(job.job_id, *result),
            )
            await self._log.mark_published(job.job_id, *result)
