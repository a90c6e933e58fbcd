"""The sweeper: finds accepted jobs that the broker does not hold and publishes them again.

``decide`` looks at facts alone; ``Sweeper`` gathers them and acts. One gateway sweeps at a time.
Publishing a job twice is harmless, since claims fence, so a wrong guess costs one prefill at most;
to make it rare, a job must look lost in two sweeps in a row.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from openlora.errors import InvalidRequest, OpenLoRAError
from openlora.joblog import AsyncJobLog, JobView, OpenJob
from openlora.protocol.events import End, Failure
from openlora.protocol.jobs import Job
from openlora.protocol.status import Heartbeat, PartitionStatus
from producer.partitioner import topic_of
from producer.publisher import Publisher

MIN_AGE_MS = 5000
"""Younger jobs are left alone: they may be on their way to the broker, or to a worker's claim."""
PERIOD_S = 2.0
FIRST_WAIT_S = 4.0
LAST_WAIT_S = 64.0
CALM_S = 10.0
"""How long nothing is cancelled after Redis was away: leases ran out, and so did the heartbeats of
workers that run the jobs."""
_LEAD_MS = 10_000  # a gateway that died is replaced after this

_logger = logging.getLogger(__name__)


@dataclass
class Decision:
    """What to do with open jobs.

    ``lost``: jobs that look lost; those that did so in the sweep before are in ``republish``.
    ``passed``: of the lost, those that the broker has, but whose owner went past them unclaimed.
    ``orphans``: of the lost, those whose worker died and whose partition nobody owns yet.
    """

    republish: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)


class Patience:
    """How often a job that its owner went past is published again: each wait doubles.

    The owner may have it in memory and not have claimed it yet, since Redis or the model is slow:
    another copy every two seconds would only add to what it is behind with.
    """

    def __init__(self) -> None:
        self._waits: dict[str, tuple[float, float]] = {}

    def allows(self, job_id: str, now: float) -> bool:
        """Whether it may be published at ``now`` (monotonic seconds); if so, that is noted."""
        due, wait_s = self._waits.get(job_id, (now, FIRST_WAIT_S))
        if now < due:
            return False
        self._waits[job_id] = (now + wait_s, min(2 * wait_s, LAST_WAIT_S))
        return True

    def forget_old(self, now: float) -> None:
        """Drop jobs that were not looked for long after they were due."""
        self._waits = {
            job_id: wait for job_id, wait in self._waits.items() if now < wait[0] + 2 * LAST_WAIT_S
        }


def decide(
    jobs: Iterable[OpenJob],
    heartbeats: Sequence[Heartbeat],
    lost_before: frozenset[str],
    topics_lost: bool = False,
) -> Decision:
    """Sort open jobs by what they need. Pure.

    A job that a living worker claimed is left to it. Of the others, those that are cancelled (or
    whose lease ran out) or past their deadline are to be ended here: their worker died, or they
    wait behind work of others. What looks lost, or all where the topics are, is published again.
    """
    workers = {heartbeat.id for heartbeat in heartbeats}
    owners = _owners(heartbeats)
    decision = Decision()
    for job in jobs:
        if job.claimed_by in workers or (job.age_ms < MIN_AGE_MS and not topics_lost):
            continue
        if job.cancelled:
            decision.cancelled.append(job.job_id)
        elif job.expired:
            decision.expired.append(job.job_id)
        elif topics_lost or _is_missing(job.published, owners):
            decision.lost.add(job.job_id)
        elif _is_passed(job.published, owners):
            decision.passed.add(job.job_id)
        elif owners and job.claimed_by is not None and _is_unowned(job.published, owners):
            # Its stream stands still, and the group takes a while to give the partition away.
            decision.orphans.add(job.job_id)
    decision.lost |= decision.passed | decision.orphans
    decision.republish = sorted(decision.lost if topics_lost else decision.lost & lost_before)
    return decision


def _owners(heartbeats: Sequence[Heartbeat]) -> dict[tuple[str, int], PartitionStatus]:
    """The newest word on each partition."""
    return {
        (status.topic, status.partition): status
        for heartbeat in sorted(heartbeats, key=lambda h: h.written_ms)
        for status in heartbeat.partitions
    }


def _is_missing(
    published: tuple[str, int, int] | None, owners: Mapping[tuple[str, int], PartitionStatus]
) -> bool:
    """Whether the broker does not hold the job: it was not acknowledged, or the topic is new."""
    if published is None:
        return True
    topic, partition, offset = published
    owner = owners.get((topic, partition))
    if owner is None or owner.paused or owner.position > offset:
        return False  # nobody looks at the partition's end
    return 0 <= owner.high_water <= offset


def _is_unowned(
    published: tuple[str, int, int] | None, owners: Mapping[tuple[str, int], PartitionStatus]
) -> bool:
    """Whether no living worker owns the partition that the job is in."""
    return published is not None and published[:2] not in owners


def places(heartbeats: Iterable[Heartbeat], topic: str) -> list[int]:
    """Partitions of ``topic`` that ready workers own, one worker in turn."""
    by_worker = [
        [status.partition for status in heartbeat.partitions if status.topic == topic]
        for heartbeat in heartbeats
        if heartbeat.ready
    ]
    rounds = itertools.zip_longest(*by_worker)
    return [number for numbers in rounds for number in numbers if number is not None]


def _is_passed(
    published: tuple[str, int, int] | None, owners: Mapping[tuple[str, int], PartitionStatus]
) -> bool:
    """Whether the owner went past an unclaimed job: another message is there now, or it waits
    in the owner's memory."""
    if published is None:
        return False
    topic, partition, offset = published
    owner = owners.get((topic, partition))
    return owner is not None and not owner.paused and owner.position > offset


def _with_places(
    jobs: Iterable[Job], orphans: Set[str], heartbeats: Sequence[Heartbeat]
) -> Iterator[tuple[Job, int | None]]:
    """Each job with the partition to publish it to; None: where its key puts it."""
    rounds: dict[str, Iterator[int]] = {}
    for job in jobs:
        partition = None
        if job.job_id in orphans:
            topic = topic_of(job)
            if topic not in rounds:
                rounds[topic] = itertools.cycle(places(heartbeats, topic))
            partition = next(rounds[topic], None)
        yield job, partition


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
        heartbeats = await self._log.heartbeats()
        total = Decision()
        async for page in self._log.open_jobs(0 if topics_lost else MIN_AGE_MS):
            decision = decide(page, heartbeats, self._lost, topics_lost)
            total.lost |= decision.lost
            total.passed |= decision.passed
            total.orphans |= decision.orphans
            for name in ("republish", "cancelled", "expired"):
                getattr(total, name).extend(getattr(decision, name))
        now = time.monotonic()
        self._patience.forget_old(now)
        total.republish = [
            job_id
            for job_id in total.republish
            if job_id not in total.passed | total.orphans or self._patience.allows(job_id, now)
        ]
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
            if await self._log.finish(job_id, end):
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
                for job, partition in _with_places(jobs, orphans, heartbeats)
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
