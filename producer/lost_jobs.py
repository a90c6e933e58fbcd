"""Which open jobs need something: those that nobody runs and nobody will. Pure.

Publishing a job twice is harmless, since claims fence, so a wrong guess costs one prefill at most;
to make it rare, a job must look lost in two sweeps in a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from openlora.joblog import OpenJob
from openlora.protocol.jobs import Job
from openlora.protocol.status import Heartbeat, PartitionStatus
from producer.partitioner import topic_of

MIN_AGE_MS = 5000
"""Younger jobs are left alone: they may be on their way to the broker, or to a worker's claim."""
FIRST_WAIT_S = 4.0
LAST_WAIT_S = 64.0
WAITING_AT_ONCE = 256
"""Jobs without a claim that are moved out of unowned partitions in one sweep: the broker holds
them, and the others' workers have their own to do."""


@dataclass
class Decision:
    """What to do with open jobs.

    ``lost``: jobs that look lost; those that did so in the sweep before are in ``republish``.
    ``passed``: of the lost, those that the broker has, but whose owner went past them unclaimed.
    ``orphans``: of the lost, those whose worker died and whose partition nobody owns yet.
    ``waiting``: of the orphans, those that nobody had claimed.
    """

    republish: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    orphans: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)


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

    def choose(self, decision: Decision, now: float) -> list[str]:
        """What is published again in this sweep, of all that might be."""
        chosen = []
        room = WAITING_AT_ONCE
        at_brokers = decision.passed | decision.orphans
        for job_id in decision.republish:
            is_waiting = job_id in decision.waiting
            if is_waiting and not room:
                continue
            if job_id in at_brokers and not self.allows(job_id, now):
                continue
            chosen.append(job_id)
            room -= is_waiting
        return chosen

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
        elif owners and _is_unowned(job.published, owners):
            # It stands still, and the group takes a while to give the partition away.
            decision.orphans.add(job.job_id)
            if job.claimed_by is None:
                decision.waiting.add(job.job_id)
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


def with_places(
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
