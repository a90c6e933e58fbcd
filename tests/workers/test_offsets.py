"""Offsets are committed only behind jobs that have all ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.offsets import OffsetLedger, Offsets, Position

JOBS = ("openlora.jobs", 3)
BATCH = ("openlora.batch", 3)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_committable_is_the_first_open_offset_in_any_order_of_ends(gaps, random):
    offsets = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    ledger = OffsetLedger(1)
    for offset in offsets:
        ledger.take(offset)
    still_open = set(offsets)
    for offset in random.sample(offsets, len(offsets)):
        ledger.end(offset)
        ledger.end(offset)
        still_open.discard(offset)
        expected = min(still_open, default=offsets[-1] + 1)
        assert ledger.committable == expected
        assert ledger.span == (offsets[-1] + 1 - expected if still_open else 0)
        ledger.check_integrity()


def test_an_offset_that_was_never_taken_changes_nothing():
    ledger = OffsetLedger(1)
    ledger.end(0)
    assert ledger.committable is None
    ledger.take(5)
    ledger.end(4)
    ledger.end(6)
    assert ledger.committable == 5


def test_taking_a_lower_offset_is_refused():
    ledger = OffsetLedger(1)
    ledger.take(5)
    with pytest.raises(ValueError, match="offset 5 taken after 5"):
        ledger.take(5)


def test_an_end_from_an_earlier_ownership_is_ignored():
    offsets = Offsets()
    offsets.assign([JOBS])
    before = offsets.take(JOBS, 7)
    offsets.revoke([JOBS])
    offsets.assign([JOBS])
    again = offsets.take(JOBS, 7)
    offsets.end(before)
    assert offsets.to_commit() == {JOBS: 7}
    assert not offsets.owns(before)
    assert offsets.owns(again)
    offsets.end(again)
    assert offsets.to_commit() == {JOBS: 8}


def test_a_topic_that_began_anew_starts_a_new_ledger():
    offsets = Offsets()
    offsets.assign([JOBS])
    old = offsets.take(JOBS, 900)
    new = offsets.take(JOBS, 0)
    offsets.end(old)
    assert offsets.to_commit() == {JOBS: 0}
    offsets.end(new)
    assert offsets.to_commit() == {JOBS: 1}


def test_a_commit_that_is_answered_after_revocation_is_ignored():
    offsets = Offsets()
    offsets.assign([JOBS])
    offsets.end(offsets.take(JOBS, 0))
    pending = offsets.to_commit()
    offsets.revoke([JOBS])
    offsets.committed(pending)
    assert offsets.committed_offset(JOBS) is None
    assert offsets.take(JOBS, 1) is None


def test_nothing_is_committed_twice():
    offsets = Offsets()
    offsets.assign([JOBS, BATCH])
    offsets.end(offsets.take(JOBS, 0))
    offsets.committed(offsets.to_commit())
    assert offsets.to_commit() == {}
    assert offsets.committed_offset(JOBS) == 1


class OwnedPartitions(RuleBasedStateMachine):
    """Offsets beside a model: per partition, the open offsets of this ownership."""

    def __init__(self):
        super().__init__()
        self.offsets = Offsets()
        self.open = {}
        self.next = {JOBS: 0, BATCH: 0}
        self.positions = []

    @rule(partition=st.sampled_from([JOBS, BATCH]))
    def assign(self, partition):
        self.offsets.assign([partition])
        self.open[partition] = []
        self.next[partition] = max(0, self.next[partition] - 2)

    @rule(partition=st.sampled_from([JOBS, BATCH]))
    def revoke(self, partition):
        self.offsets.revoke([partition])
        self.open.pop(partition, None)

    @rule(partition=st.sampled_from([JOBS, BATCH]), gap=st.integers(0, 2))
    def take(self, partition, gap):
        offset = self.next[partition] + gap
        position = self.offsets.take(partition, offset)
        assert (position is not None) == (partition in self.open)
        if position is not None:
            self.next[partition] = offset + 1
            self.open[partition].append(position)
            self.positions.append(position)

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def end(self, data):
        position: Position = data.draw(st.sampled_from(self.positions))
        self.offsets.end(position)
        for open_positions in self.open.values():
            if position in open_positions:
                open_positions.remove(position)

    @rule()
    def commit(self):
        self.offsets.committed(self.offsets.to_commit())

    @invariant()
    def never_beyond_an_open_job(self):
        self.offsets.check_integrity()
        for partition, offset in self.offsets.to_commit().items():
            assert all(position.offset >= offset for position in self.open[partition])


TestOwnedPartitions = OwnedPartitions.TestCase
