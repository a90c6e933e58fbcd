"""How long a job accepted now would wait, from the workers' heartbeats. Pure.

Jobs that wait are those behind the workers' positions and in their engines' queues, batches' lines
excepted: those take what jobs leave. How fast they
are served shows in how the committed offsets move while some wait. Heartbeats are a second old when
they are read, and are read once a second: what came since is added. Without that a crowd would be
let in until the first of it shows there, and then nobody until it was served. Of what other
gateways took a counter that all of them share tells (``limits.InFlight.arrive``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from gateway.workers_view import queue_depth
from openlora.errors import Overloaded
from openlora.protocol.names import BATCH_TOPIC
from openlora.protocol.status import Heartbeat

WINDOW_S = 30.0
AGE_S = 1.0
"""How old what a heartbeat tells is when it is read, about."""
SHORT_QUEUE = 64
"""So many waiting jobs are no sign of anything: they start within moments of each other."""
FEW_WAIT = 16
"""What is served while so few wait tells how fast they come, not how fast they could be served."""
MAX_RETRY_AFTER_MS = 30_000
WITHDRAWN = 10_000
"""More than are refused at once behind their count: a counter that falls by more is another."""


class _Interval(NamedTuple):
    began: float
    seconds: float
    served: int


class QueueEstimate:
    """Fed with all heartbeats about once a second.

    Args:
        max_wait_s: jobs that would wait longer are refused.

    Attributes:
        depth: jobs that wait. rate: jobs served per second lately, while more than ``FEW_WAIT``
            waited; None where they never did.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._committed: dict[tuple[str, int], int] = {}
        self._served: deque[_Interval] = deque()
        self._taken: deque[float] = deque()
        self._arrived: deque[tuple[float, int]] = deque()
        self._uncounted = 0
        self._updated_at = 0.0
        self.depth = 0
        self.rate: float | None = None

    def update(
        self, heartbeats: Sequence[Heartbeat], now: float, arrived: int | None = None
    ) -> None:
        """``now``: monotonic seconds. ``arrived``: what the shared counter says."""
        began, was_busy = self._updated_at, self.depth > FEW_WAIT
        self.depth = queue_depth(heartbeats)
        self._updated_at = now
        while self._taken and self._taken[0] < now - AGE_S:
            self._taken.popleft()
        if arrived is not None:
            self._count(arrived, now)
        committed = {
            (status.topic, status.partition): status.committed
            for heartbeat in heartbeats
            for status in heartbeat.partitions
            if status.high_water >= 0 and status.topic != BATCH_TOPIC
        }
        before, self._committed = self._committed, committed
        if was_busy:
            # A partition that changed hands, or a topic made anew, would look like a leap.
            steps = (max(0, committed[p] - before[p]) for p in committed.keys() & before.keys())
            self._served.append(_Interval(began, now - began, sum(steps)))
        while self._served and self._served[0].began < now - WINDOW_S:
            self._served.popleft()
        seconds = sum(interval.seconds for interval in self._served)
        served = sum(interval.served for interval in self._served)
        self.rate = served / seconds if seconds else None

    def depth_at(self, now: float) -> int:
        """Jobs that wait by now: those of the heartbeats, what came and what was served since."""
        served = (self.rate or 0.0) * (now - self._updated_at + AGE_S)
        came = len(self._taken)
        if self._arrived:
            counted = self._arrived[-1][1] - self._arrived[0][1]
            came = max(came, counted + self._uncounted)
        return max(0, round(self.depth + came - served))

    def wait_s(self, now: float) -> float:
        """Seconds until a job accepted now would start; 0 where that cannot be told."""
        depth = self.depth_at(now)
        if depth <= SHORT_QUEUE or not self.rate:
            return 0.0
        return depth / self.rate

    def take(self, deadline_s: float | None, now: float) -> None:
        """Count one more job, or refuse it: it would wait too long, or past its own deadline.

        Raises:
            Overloaded: says how long the queue is; carries ``retry_after_ms``.
        """
        self._check(deadline_s, now)
        self._taken.append(now)
        self._uncounted += 1

    def counted(self, arrived: int, deadline_s: float | None, now: float) -> None:
        """The shared counter has one that was taken here, and says ``arrived``: the moment in which
        other gateways' crowds show. Raises Overloaded as ``take`` does."""
        self._count(arrived - 1, now)  # those before it
        self._check(deadline_s, now)
        self._count(arrived, now)

    def _count(self, arrived: int, now: float) -> None:
        if self._arrived and arrived < self._arrived[-1][1] - WITHDRAWN:
            self._arrived.clear()  # Redis lost it, and began anew
        self._arrived.append((now, arrived))
        self._uncounted = 0
        while len(self._arrived) > 1 and self._arrived[1][0] <= self._updated_at - AGE_S:
            self._arrived.popleft()

    def _check(self, deadline_s: float | None, now: float) -> None:
        wait_s = self.wait_s(now)
        limit_s = self._max_wait_s if deadline_s is None else min(self._max_wait_s, deadline_s)
        if wait_s > limit_s:
            retry_after_ms = round(min(MAX_RETRY_AFTER_MS, 1000 * max(1.0, wait_s - limit_s)))
            raise Overloaded(
                f"{self.depth_at(now)} jobs wait, about {wait_s:.0f} s of work; this one could not "
                f"start within {limit_s:g} s, so send it again later",
                retry_after_ms=retry_after_ms,
            )
