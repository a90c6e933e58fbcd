"""The tiers of all workers' adapters, as ``/metrics`` shows them.

Labels name workers and tiers, never an adapter: what a private one is called, how often it is used
and where it lives is nobody's but its tenant's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from openlora.protocol.status import AdapterRecord, Heartbeat, TierStatus

_LABELS = ("worker", "tier")
_PREFIX = "openlora_adapter_tier_"


class TierMetrics(Collector):
    """Shows what the newest heartbeats say; ``update`` comes before each ``collect``."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, TierStatus]] = []
        self._store = (0, 0)

    def update(self, heartbeats: Iterable[Heartbeat], records: Iterable[AdapterRecord]) -> None:
        """``records``: the versions in use, for what the store is known to hold."""
        self._rows = [(beat.id, tier) for beat in heartbeats for tier in beat.tiers]
        sizes = {record.hash: record.size_bytes for record in records}
        self._store = len(sizes), sum(sizes.values())

    def collect(self) -> Iterator[Metric]:
        """One family for each number of a tier."""
        for name, what in (
            ("hits", "Times that a wanted adapter was in the tier."),
            ("loads", "Adapters brought into the tier."),
            ("failures", "Loads that failed."),
            ("evictions", "Adapters that had to leave the tier."),
        ):
            family = CounterMetricFamily(_PREFIX + name, what, labels=_LABELS)
            for worker, tier in self._rows:
                family.add_metric((worker, tier.tier), getattr(tier, name))
            yield family
        for name, what, field in (
            ("adapters", "Adapters in the tier now.", "adapters"),
            ("bytes", "What they take.", "bytes_used"),
            ("limit_bytes", "The tier's budget.", "bytes_limit"),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, what, labels=_LABELS)
            for worker, tier in self._rows:
                gauge.add_metric((worker, tier.tier), getattr(tier, field))
            # The store is everybody's.
            stored = {"adapters": self._store[0], "bytes": self._store[1]}.get(name)
            if stored is not None:
                gauge.add_metric(("", "store"), stored)
            yield gauge
        histogram = HistogramMetricFamily(
            _PREFIX + "load_seconds", "Time to bring an adapter in.", labels=_LABELS
        )
        for worker, tier in self._rows:
            histogram.add_metric((worker, tier.tier), _buckets(tier), tier.load_seconds)
        yield histogram


def _buckets(tier: TierStatus) -> Sequence[tuple[str, float]]:
    """(upper bound, loads up to it), as Prometheus counts."""
    bounds = [*(f"{bound:g}" for bound in tier.load_buckets_s), "+Inf"]
    counts = tier.load_counts or (0,)
    total, found = 0, []
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found
