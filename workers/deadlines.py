"""When running jobs are due. Pure."""

from __future__ import annotations

from collections.abc import Container
from heapq import heapify, heappop, heappush

from openlora.protocol.jobs import Job

TIDY_AT_LEAST = 1024


class Deadlines:
    """The deadlines of jobs, earliest first.

    Jobs that ended in time stay for a while: a deadline may be a day away, so from time to time
    they are thrown out together.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []
        self._tidy_at = TIDY_AT_LEAST

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, job: Job, running: Container[str]) -> None:
        """Watch ``job``, if it has a deadline. ``running``: IDs of the jobs that have not ended."""
        if job.deadline_ms is None:
            return
        heappush(self._heap, (job.deadline_ms, job.job_id))
        if len(self._heap) >= self._tidy_at:
            self._heap = [entry for entry in self._heap if entry[1] in running]
            heapify(self._heap)
            self._tidy_at = max(TIDY_AT_LEAST, 2 * len(self._heap))

    def next_in_s(self, now_ms: float) -> float:
        """Seconds until the next one, 0 where it has passed; infinite where there is none."""
        return max(0.0, (self._heap[0][0] - now_ms) / 1e3) if self._heap else float("inf")

    def passed(self, now_ms: float) -> list[str]:
        """IDs of the jobs whose deadline has passed, each once."""
        job_ids = []
        while self._heap and self._heap[0][0] <= now_ms:
            job_ids.append(heappop(self._heap)[1])
        return job_ids
