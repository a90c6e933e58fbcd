"""Which running jobs are due."""

from __future__ import annotations

from tests.workers.running import a_job
from workers.deadlines import TIDY_AT_LEAST, Deadlines


def test_what_has_passed_is_told_once_and_earliest_first():
    deadlines = Deadlines()
    assert deadlines.next_in_s(0) == float("inf")
    late, early, never = a_job(deadline_ms=3000), a_job(deadline_ms=2000), a_job()
    for job in (late, early, never):
        deadlines.add(job, ())
    assert deadlines.next_in_s(500) == 1.5
    assert deadlines.next_in_s(2500) == 0
    assert deadlines.passed(1999) == []
    assert deadlines.passed(3000) == [early.job_id, late.job_id]
    assert deadlines.passed(9000) == []


def test_jobs_that_ended_long_before_their_deadline_are_forgotten():
    deadlines = Deadlines()
    running = {}
    for _ in range(20):
        open_jobs = [a_job(deadline_ms=86_400_000) for _ in range(TIDY_AT_LEAST // 4)]
        running = {job.job_id for job in open_jobs}
        for job in open_jobs:
            deadlines.add(job, running)
        assert len(deadlines) <= TIDY_AT_LEAST
    assert running <= set(deadlines.passed(86_400_000))
