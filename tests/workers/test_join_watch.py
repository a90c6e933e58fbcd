"""When a worker gives up a join that comes to nothing."""

from __future__ import annotations

import random

from workers.join_watch import PATIENCE_S, SPREAD_S, JoinWatch


def test_a_join_is_given_up_after_its_time_and_the_next_one_has_as_long():
    watch = JoinWatch(random.Random(1))
    stuck = [t for t in range(100) if watch.is_stuck(joined=False, now=t)]
    waits = [b - a for a, b in zip([0, *stuck], stuck, strict=False)]
    assert len(waits) >= 4
    assert all(PATIENCE_S <= wait <= PATIENCE_S + SPREAD_S + 1 for wait in waits)
    assert len(set(waits)) > 1


def test_a_member_is_never_stuck_and_one_that_was_thrown_out_begins_to_count():
    watch = JoinWatch(random.Random(1))
    assert not any(watch.is_stuck(joined=True, now=t) for t in range(100))
    assert not watch.is_stuck(joined=False, now=100)
    assert not watch.is_stuck(joined=False, now=100 + PATIENCE_S - 1)
    assert not watch.is_stuck(joined=True, now=100 + PATIENCE_S)
    assert not watch.is_stuck(joined=False, now=1000)
    assert watch.is_stuck(joined=False, now=1000 + PATIENCE_S + SPREAD_S)


def test_workers_do_not_come_back_at_the_same_moment():
    pauses = {round(JoinWatch(random.Random(seed)).pause_s(), 3) for seed in range(10)}
    assert len(pauses) == 10
    assert all(SPREAD_S / 4 <= pause <= SPREAD_S for pause in pauses)
