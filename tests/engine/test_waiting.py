"""Queues and the parking lot: one place for each sequence, patience counted from the first wait."""

from __future__ import annotations

from openlora.engine.sequence import Status
from openlora.engine.waiting import ROOM_PATIENCE_STEPS, WaitingSequences
from tests.engine.sequences import make_sequence


def waiting_with(*ids, adapters=()):
    waiting = WaitingSequences(room_epoch=0)
    sequences = [make_sequence(i, [1]) for i in ids]
    for sequence in sequences:
        sequence.adapters = tuple((name, 1.0) for name in adapters)
        waiting.enqueue(sequence)
    return waiting, sequences


def test_the_oldest_is_first_whenever_it_is_queued():
    waiting, (third, first, second) = waiting_with(3, 1, 2)
    assert waiting.first("interactive") is first
    waiting.dequeue(first)
    assert waiting.first("interactive") is second
    waiting.enqueue(first)
    assert waiting.first("interactive") is first
    assert waiting.first("batch") is None
    assert (waiting.num_queued, waiting.num_queued_batch) == (3, 0)
    lines = make_sequence(4, [1], priority="batch")
    waiting.enqueue(lines)
    assert waiting.first("batch") is lines
    assert (waiting.num_queued, waiting.num_queued_batch) == (4, 1)
    assert third.status is Status.WAITING


def test_loading_wakes_those_that_wait_for_this_adapter():
    waiting, (one, two) = waiting_with(1, 2, adapters=["a", "b"])
    two.adapters = (("c", 1.0),)
    waiting.park_until_loaded(one)
    waiting.park_until_loaded(two)
    assert (waiting.num_queued, waiting.num_parked) == (0, 2)
    assert waiting.wake_loaded("b") == [one]
    assert waiting.wake_loaded("b") == []
    assert (one.status, two.status) == (Status.WAITING, Status.PARKED)
    waiting.check_integrity()


def test_room_waiters_wake_when_the_epoch_changes():
    waiting, (one,) = waiting_with(1, adapters=["a"])
    waiting.park_until_room(one, step=5)
    waiting.wake_for_room(0)
    assert one.status is Status.PARKED
    waiting.wake_for_room(1)
    assert one.status is Status.WAITING
    # Its adapter had to go meanwhile: room alone does not wake it.
    waiting.park_until_loaded(one)
    waiting.wake_for_room(2)
    assert one.status is Status.PARKED
    assert waiting.num_parked == 1
    waiting.check_integrity()


def test_patience_counts_from_the_first_wait_and_ends_with_it():
    waiting, (old, young) = waiting_with(1, 2, adapters=["a"])
    waiting.park_until_room(old, step=10)
    waiting.wake_for_room(1)
    waiting.park_until_room(old, step=400)
    assert not waiting.is_held_back(young, 10 + ROOM_PATIENCE_STEPS)
    assert waiting.is_held_back(young, 11 + ROOM_PATIENCE_STEPS)
    assert not waiting.is_held_back(old, 11 + ROOM_PATIENCE_STEPS)
    waiting.leave(old)
    assert not waiting.is_held_back(young, 11 + ROOM_PATIENCE_STEPS)
    assert old.parked_at_step == -1


def test_one_that_has_lacked_room_for_longer_than_any_waiter_is_first_for_it():
    waiting, (old,) = waiting_with(1, adapters=["a"])
    assert not waiting.is_first_for_room(10, 10 + ROOM_PATIENCE_STEPS)
    assert waiting.is_first_for_room(10, 11 + ROOM_PATIENCE_STEPS)
    waiting.park_until_room(old, step=9)
    assert not waiting.is_first_for_room(10, 11 + ROOM_PATIENCE_STEPS)
    waiting.leave(old)
    assert waiting.is_first_for_room(10, 11 + ROOM_PATIENCE_STEPS)


def test_who_was_held_back_asks_again_when_the_patient_one_has_left():
    waiting, (old, young) = waiting_with(1, 2, adapters=["a"])
    waiting.park_until_room(old, step=1)
    waiting.park_until_room(young, step=600)
    waiting.leave(old)
    waiting.wake_for_room(0)
    assert young.status is Status.WAITING
