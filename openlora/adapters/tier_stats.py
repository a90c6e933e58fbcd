"""What a tier of adapters has done and holds: counted where it happens, read for metrics.

The tiers, the fastest first: "device" (pages), "host" (memory), "disk" (copies of what a remote
store holds). Stdlib only.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field

LOAD_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
"""Upper bounds of the load times' histogram; what took longer is counted behind the last."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier of one engine, since its start.

    Attributes:
        tier: "device", "host" or "disk".
        adapters: how many are there now.
        bytes_used, bytes_limit: what they take, and the tier's budget.
        hits: times that an adapter was wanted here and was here.
        loads: times that one was brought in; failures: times that this failed.
        evictions: times that one had to go.
        load_seconds: sum of the loads' times.
        load_counts: loads by ``LOAD_BUCKETS_S``, and last those that took longer.
        names: adapters that are there now, the longest unused first; none where that takes
            looking.
    """

    tier: str
    adapters: int = 0
    bytes_used: int = 0
    bytes_limit: int = 0
    hits: int = 0
    loads: int = 0
    failures: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    load_counts: tuple[int, ...] = (0,) * (len(LOAD_BUCKETS_S) + 1)
    names: tuple[str, ...] = ()


@dataclass(slots=True)
class TierCounter:
    """Counts one tier's events. Thread-safe."""

    hits: int = 0
    loads: int = 0
    failures: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    load_counts: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BUCKETS_S) + 1))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hit(self) -> None:
        """An adapter was wanted and was there."""
        with self._lock:
            self.hits += 1

    def loaded(self, seconds: float) -> None:
        """An adapter was brought in."""
        with self._lock:
            self.loads += 1
            self.load_seconds += seconds
            self.load_counts[bisect_left(LOAD_BUCKETS_S, seconds)] += 1

    def failed(self) -> None:
        """An adapter could not be brought in."""
        with self._lock:
            self.failures += 1

    def evicted(self) -> None:
        """An adapter had to go."""
        with self._lock:
            self.evictions += 1

    def stats(
        self,
        tier: str,
        *,
        adapters: int,
        bytes_used: int,
        bytes_limit: int,
        names: tuple[str, ...] = (),
    ) -> TierStats:
        """The counts, with what is there now."""
        with self._lock:
            return TierStats(
                tier,
                adapters,
                bytes_used,
                bytes_limit,
                self.hits,
                self.loads,
                self.failures,
                self.evictions,
                self.load_seconds,
                tuple(self.load_counts),
                names,
            )
