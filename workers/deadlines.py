"""When running jobs are due. Pure."""

from __future__ import annotations

from heapq import heappop, heappush

from openlora.protocol.jobs import Job


class Deadlines:
    """The deadlines of jobs, earliest first; a job that ends in time stays until its own passes."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []

    def add(self, job: Job) -> None:
        """Watch ``job``, if it has a deadline."""
        if job.deadline_ms is not None:
            heappush(self._heap, (job.deadline_ms, job.job_id))

    def next_in_s(self, now_ms: float) -> float:
        """Seconds until the next one, 0 where it has passed; infinite where there is none."""
        return max(0.0, (self._heap[0][0] - now_ms) / 1e3) if self._heap else float("inf")

    def passed(self, now_ms: float) -> list[str]:
        """IDs of the jobs whose deadline has passed, each once."""
        job_ids = []
        while self._heap and self._heap[0][0] <= now_ms:
            job_ids.append(heappop(self._heap)[1])
        return job_ids
