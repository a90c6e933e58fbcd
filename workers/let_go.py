"""Jobs that this worker had and let go, since another claimed them: is that claim there to stay?

Redis may lose the last seconds of what it acknowledged. Where a claim is lost and the worker that
made it has died as well, the job's hash names the worker before it, which lives but has dropped
the job: nobody would look for it. So whoever let a job go looks whose it is until a claim that it
has seen is old enough to be kept, and disowns the job if it finds it to be its own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Container
from typing import NamedTuple

from workers.token_sink import TokenSink

LOSABLE_S = 3.0
"""How much of what it acknowledged Redis may lose, with ``appendfsync everysec`` and some room."""

logger = logging.getLogger("workers.let_go")


class _Watched(NamedTuple):
    """``seen``: the newest claim at the last look; 0 before the first."""

    due: float
    job_id: str
    seen: int


class LetGo:
    """In the order in which they are to be looked at; used by the loop's thread alone."""

    def __init__(self, sink: TokenSink) -> None:
        self._sink = sink
        self._watched: deque[_Watched] = deque()

    def __len__(self) -> int:
        return len(self._watched)

    def add(self, job_id: str, now: float) -> None:
        """The job is another's, or nobody's, at ``now`` (monotonic seconds)."""
        self._watched.append(_Watched(now + LOSABLE_S, job_id, 0))

    def turn(self, now: float, running: Container[str]) -> None:
        """Look at those that are due. ``running``: IDs of jobs that this worker has again.

        Raises:
            Stopped: the worker must stop now and Redis does not answer.
        """
        due = []
        while self._watched and self._watched[0].due <= now:
            due.append(self._watched.popleft())
        due = [watched for watched in due if watched.job_id not in running]
        if not due:
            return
        found = self._sink.disown([watched.job_id for watched in due])
        for watched, newest in zip(due, found, strict=True):
            if newest.disowned:
                logger.warning("event=claim_lost job=%s next=left_to_sweeper", watched.job_id)
            # Kept is a claim that was there at two looks; a job that is gone has none to lose.
            if newest.epoch not in (0, watched.seen):
                self._watched.append(_Watched(now + LOSABLE_S, watched.job_id, newest.epoch))
