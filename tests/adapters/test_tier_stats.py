"""Counts of a tier, and where a load's time is put."""

from __future__ import annotations

from openlora.adapters.tier_stats import LOAD_BUCKETS_S, TierCounter


def test_times_are_counted_up_to_their_bounds_and_behind_the_last():
    counter = TierCounter()
    for seconds in (0.0005, LOAD_BUCKETS_S[0], 0.3, 1000.0):
        counter.loaded(seconds)
    counter.hit()
    counter.failed()
    counter.evicted()
    stats = counter.stats("disk", adapters=2, bytes_used=7, bytes_limit=9, names=("a",))
    assert stats.load_counts == (2, 0, 0, 0, 1, 0, 0, 1)
    assert stats.load_seconds == 0.0005 + LOAD_BUCKETS_S[0] + 0.3 + 1000.0
    assert (stats.hits, stats.loads, stats.failures, stats.evictions) == (1, 4, 1, 1)
    assert (stats.tier, stats.adapters, stats.bytes_used, stats.bytes_limit) == ("disk", 2, 7, 9)
