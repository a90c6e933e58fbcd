"""Runs that ended a moment ago: Redis may come back from a crash without knowing that they did.

What it acknowledges it writes to its disk, or to a replica, up to two seconds later. A job whose
end it lost would look to everybody like one that its worker runs. So each end is said once more
when it must have been kept, by the worker that still has the whole answer.
"""

from __future__ import annotations

import logging
from collections import deque

from workers.let_go import LOSABLE_S, LetGo
from workers.run import Run
from workers.token_sink import TokenSink, Verdict

logger = logging.getLogger("workers.ended_runs")


class EndedRuns:
    """In the order in which they ended; used by the loop's thread alone.

    ``let_go``: takes the jobs that turn out to be open, and another's.
    """

    def __init__(self, sink: TokenSink, let_go: LetGo) -> None:
        self._sink = sink
        self._let_go = let_go
        self._runs: deque[tuple[float, Run]] = deque()

    def add(self, run: Run, now: float) -> None:
        """``run``'s end is in its log, at ``now`` (monotonic seconds)."""
        self._runs.append((now + LOSABLE_S, run))

    def turn(self, now: float) -> None:
        """Say the ends again that are due.

        Raises:
            Stopped: the worker must stop now and Redis does not answer.
        """
        runs = []
        while self._runs and self._runs[0][0] <= now:
            runs.append(self._runs.popleft()[1])
        for run, verdict in self._sink.append(runs):
            if verdict is Verdict.ENDED:
                continue
            if verdict is Verdict.ANEW:
                # Its log holds another text, which is not whole, and the run is over here.
                logger.warning("event=end_lost job=%s next=left_to_sweeper", run.job.job_id)
                self._sink.disown([run.job.job_id])
            self._let_go.add(run.job.job_id, now)
