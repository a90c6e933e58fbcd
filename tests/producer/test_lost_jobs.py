"""What is decided about open jobs, from facts alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.joblog import OpenJob
from openlora.protocol.names import JOBS_TOPIC
from openlora.protocol.status import Heartbeat, PartitionStatus
from producer import lost_jobs
from producer.lost_jobs import MIN_AGE_MS, Decision, Patience, decide, places
from tests.joblog.test_log import a_heartbeat

_OLD = MIN_AGE_MS


def an_open_job(**fields) -> OpenJob:
    facts = {"age_ms": _OLD, "epoch": 0, "cancelled": False, "expired": False}
    facts |= {"published": (JOBS_TOPIC, 3, 10), "claimed_by": None}
    return OpenJob(job_id="j", **(facts | fields))


def an_owner(worker_id: str = "w", written_ms: int = 1, **fields) -> Heartbeat:
    facts = {"committed": 5, "position": 10, "high_water": 11, "partition": 3}
    status = PartitionStatus(JOBS_TOPIC, **(facts | fields))
    return a_heartbeat(worker_id, written_ms=written_ms, partitions=(status,))


def looks_lost(job: OpenJob, heartbeats: Sequence[Heartbeat]) -> bool:
    first = decide([job], heartbeats, frozenset())
    assert first.republish == []  # never at first sight
    second = decide([job], heartbeats, frozenset(first.lost))
    assert second.republish == sorted(first.lost)
    assert (first.cancelled, first.expired) == ([], [])
    assert first.passed <= first.lost
    return bool(first.lost)


@pytest.mark.parametrize(
    ("job", "heartbeats", "is_lost"),
    [
        # Not acknowledged by the broker.
        (an_open_job(published=None), [], True),
        (an_open_job(published=None), [an_owner()], True),
        (an_open_job(published=None, age_ms=_OLD - 1), [], False),
        # Waiting: no worker lives, or the owner has not come to it.
        (an_open_job(), [], False),
        (an_open_job(), [an_owner()], False),
        (an_open_job(), [an_owner(position=2)], False),
        # The partition ends before it: the topic was made anew.
        (an_open_job(), [an_owner(position=4, high_water=10)], True),
        (an_open_job(), [an_owner(position=0, high_water=0)], True),
        (an_open_job(), [an_owner(position=4, high_water=-1)], False),
        (an_open_job(), [an_owner(position=4, high_water=10, paused=True)], False),
        # The owner went past it without a claim.
        (an_open_job(), [an_owner(position=11)], True),
        (an_open_job(claimed_by="dead", epoch=1), [an_owner(position=11)], True),
        (an_open_job(claimed_by="dead", epoch=1), [an_owner(position=10)], False),
        # Its worker died: others live, and its partition has no owner yet, or has one.
        (an_open_job(claimed_by="dead", epoch=1), [], False),
        (an_open_job(claimed_by="dead", epoch=1), [an_owner(partition=4)], True),
        (an_open_job(), [an_owner(partition=4)], True),
        # Claimed by a living worker, whoever owns the partition now.
        (an_open_job(claimed_by="w", epoch=1), [an_owner(position=11)], False),
        (an_open_job(claimed_by="w", epoch=1, published=None), [an_owner()], False),
        (an_open_job(claimed_by="a", epoch=1), [an_owner("b"), a_heartbeat("a")], False),
        # The newer word counts.
        (an_open_job(), [an_owner("b", 2, position=11), an_owner("a", 1)], True),
        (an_open_job(), [an_owner("b", 2), an_owner("a", 1, position=11)], False),
    ],
)
def test_lost_or_not(job: OpenJob, heartbeats: Sequence[Heartbeat], is_lost: bool) -> None:
    assert looks_lost(job, heartbeats) == is_lost


def test_orphans_go_to_partitions_of_ready_workers_in_turn() -> None:
    job = an_open_job(claimed_by="dead", epoch=1)
    others = [an_owner(partition=4)]
    for unowned in (job, an_open_job()):
        decision = decide([unowned], others, frozenset())
        assert decision.orphans == {"j"}
        assert decision.waiting == ({"j"} if unowned.claimed_by is None else set())
    heartbeats = [
        a_heartbeat("a", partitions=tuple(PartitionStatus(JOBS_TOPIC, n, 0, 0, 0) for n in (1, 2))),
        a_heartbeat("b", partitions=(PartitionStatus(JOBS_TOPIC, 7, 0, 0, 0),)),
        a_heartbeat("c", ready=False, partitions=(PartitionStatus(JOBS_TOPIC, 8, 0, 0, 0),)),
    ]
    assert places(heartbeats, JOBS_TOPIC) == [1, 7, 2]
    assert places(heartbeats, "another") == []


def test_only_a_job_that_its_owner_went_past_waits_to_be_published_again() -> None:
    assert decide([an_open_job()], [an_owner(position=11)], frozenset()).passed == {"j"}
    new_topic = an_owner(position=0, high_water=0)
    assert decide([an_open_job()], [new_topic], frozenset()).passed == set()
    assert decide([an_open_job(published=None)], [an_owner()], frozenset()).passed == set()


def test_few_jobs_that_nobody_claimed_are_moved_at_once(monkeypatch):
    """They wait in partitions without an owner; those whose stream stands still go all."""
    monkeypatch.setattr(lost_jobs, "WAITING_AT_ONCE", 2)
    waiting, stopped = set("abcde"), set("vwxyz")
    decision = Decision(
        republish=sorted(waiting | stopped), orphans=waiting | stopped, waiting=waiting
    )
    patience = Patience()
    assert patience.choose(decision, 0.0) == ["a", "b", *"vwxyz"]
    assert patience.choose(decision, 1.0) == ["c", "d"]
    assert patience.choose(decision, 2.0) == ["e"]


def test_each_wait_before_another_copy_doubles() -> None:
    patience = Patience()
    allowed = [second for second in range(0, 301, 2) if patience.allows("j", second)]
    assert allowed == [0, 4, 12, 28, 60, 124, 188, 252]
    assert patience.allows("another", 300)
    patience.forget_old(1000)
    assert patience.allows("j", 1000)
    assert not patience.allows("j", 1003)


def test_what_nobody_runs_and_nobody_wants_is_ended() -> None:
    for published in (None, (JOBS_TOPIC, 3, 10)):
        for heartbeats in ([], [an_owner()]):
            cancelled = an_open_job(cancelled=True, published=published)
            assert decide([cancelled], heartbeats, frozenset("j")) == Decision(cancelled=["j"])
            expired = an_open_job(expired=True, published=published)
            assert decide([expired], heartbeats, frozenset("j")) == Decision(expired=["j"])
    # Its living worker ends it.
    claimed = an_open_job(cancelled=True, expired=True, claimed_by="w")
    assert decide([claimed], [an_owner()], frozenset()) == Decision()


statuses = st.builds(
    PartitionStatus,
    st.just(JOBS_TOPIC),
    st.integers(0, 2),
    *[st.integers(-1, 6)] * 3,
    st.booleans(),
)
heartbeats = st.builds(
    lambda name, written, parts: a_heartbeat(name, written_ms=written, partitions=tuple(parts)),
    st.sampled_from("ab"),
    st.integers(0, 3),
    st.lists(statuses, max_size=3),
)
open_jobs = st.builds(
    OpenJob,
    st.uuids().map(str),
    st.integers(0, 2 * _OLD),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.none() | st.tuples(st.just(JOBS_TOPIC), st.integers(0, 2), st.integers(0, 6)),
    st.sampled_from([None, "a", "c"]),
)


def test_what_was_in_lost_topics_is_published_at_once_but_for_what_runs():
    young, runs = an_open_job(age_ms=0), an_open_job(claimed_by="w")
    assert decide([young], [an_owner()], frozenset(), topics_lost=True).republish == ["j"]
    assert decide([runs], [an_owner()], frozenset(), topics_lost=True) == Decision()
    cancelled = decide([an_open_job(cancelled=True)], [], frozenset(), topics_lost=True)
    assert (cancelled.cancelled, cancelled.republish) == (["j"], [])


@given(st.lists(open_jobs, max_size=6), st.lists(heartbeats, max_size=3), st.booleans())
def test_each_job_gets_one_treatment_and_claimed_ones_none(jobs, beats, seen_before: bool) -> None:
    before = frozenset(job.job_id for job in jobs) if seen_before else frozenset()
    decision = decide(jobs, beats, before)
    treated = [*decision.cancelled, *decision.expired, *decision.lost]
    assert len(set(treated)) == len(treated)
    assert set(decision.republish) == (decision.lost if seen_before else set())
    living = {beat.id for beat in beats}
    left_alone = {j.job_id for j in jobs if j.claimed_by in living or j.age_ms < MIN_AGE_MS}
    assert not left_alone & set(treated)
