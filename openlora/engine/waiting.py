"""Sequences that do not run: queued, or parked until their adapters can be had. Pure.

One that waits for adapter pages is a room waiter from its first such wait until it runs, so that
its patience is not counted anew each time it is queued again and finds no room.
"""

from __future__ import annotations

from collections.abc import Collection

from openlora.engine.fair_queue import FairQueue
from openlora.engine.request import Priority
from openlora.engine.sequence import Sequence, Status

ROOM_PATIENCE_STEPS = 512


def _age(sequence: Sequence) -> int:
    return sequence.sequence_id


class WaitingSequences:
    """Holds every sequence whose status is WAITING (queued, by age) or PARKED.

    Args:
        room_epoch: ``Residency.room_epoch`` at the start.
    """

    def __init__(self, room_epoch: int) -> None:
        # Batches come grouped by adapter, so that each is loaded once.
        self._queues: dict[Priority, FairQueue] = {
            "interactive": FairQueue(by_adapter=True),
            "batch": FairQueue(by_adapter=False),
        }
        self._loading: dict[int, Sequence] = {}
        # In order of their first wait; one that is back in the queue stays until it runs.
        self._room_waiters: dict[int, Sequence] = {}
        self._seen_room_epoch = room_epoch

    @property
    def num_queued(self) -> int:
        """Sequences that could start now but for seats, blocks and budget."""
        return sum(map(len, self._queues.values()))

    @property
    def num_queued_batch(self) -> int:
        """Those of them that no interactive one waits for."""
        return len(self._queues["batch"])

    @property
    def num_parked(self) -> int:
        """Sequences that wait for an adapter."""
        return len(self._parked())

    def first(self, priority: Priority, running: Collection[Sequence] = ()) -> Sequence | None:
        """The queued one of this priority that is to start next beside ``running``."""
        return self._queues[priority].first(running)

    def start(self, sequence: Sequence) -> None:
        """It has its seat: it runs from now on."""
        self.leave(sequence)
        self._queues[sequence.priority].serve(sequence)

    def enqueue(self, sequence: Sequence) -> None:
        """Queue a sequence that is in no other place."""
        sequence.status = Status.WAITING
        self._queues[sequence.priority].add(sequence)

    def dequeue(self, sequence: Sequence) -> None:
        """Take a queued sequence out."""
        self._queues[sequence.priority].remove(sequence)

    def park_until_loaded(self, sequence: Sequence) -> None:
        """Park a queued sequence until ``wake_loaded`` names one of its adapters."""
        self.dequeue(sequence)
        sequence.status = Status.PARKED
        self._loading[sequence.sequence_id] = sequence

    def park_until_room(self, sequence: Sequence, step: int) -> None:
        """Park a queued sequence until ``wake_for_room`` sees another epoch."""
        self.dequeue(sequence)
        sequence.status = Status.PARKED
        if sequence.sequence_id not in self._room_waiters:
            sequence.parked_at_step = step
            self._room_waiters[sequence.sequence_id] = sequence

    def wake_loaded(self, adapter: str) -> list[Sequence]:
        """``adapter`` was loaded or failed: its waiters queue again, and are returned by age."""
        woken = sorted(
            (s for s in self._loading.values() if any(adapter == key for key, _ in s.adapters)),
            key=_age,
        )
        for sequence in woken:
            del self._loading[sequence.sequence_id]
            self.enqueue(sequence)
        return woken

    def wake_for_room(self, room_epoch: int) -> None:
        """Queue the room waiters again, if ``room_epoch`` has changed since the last call."""
        if room_epoch == self._seen_room_epoch:
            return
        self._seen_room_epoch = room_epoch
        for sequence in self.room_waiters():
            self.enqueue(sequence)

    @property
    def has_room_waiters(self) -> bool:
        """Whether any sequence has been waiting for adapter pages."""
        return bool(self._room_waiters)

    def room_waiters(self) -> list[Sequence]:
        """Those that are parked and wait for nothing but room, in the order of their first wait."""
        return [
            s
            for s in self._room_waiters.values()
            if s.status is Status.PARKED and s.sequence_id not in self._loading
        ]

    def wake_at_next_chance(self) -> None:
        """Let the next ``wake_for_room`` queue the room waiters, whatever the epoch."""
        self._seen_room_epoch = -1

    def is_held_back(self, sequence: Sequence, step: int) -> bool:
        """Whether another one has waited for room so long that it goes before this one."""
        first = next(iter(self._room_waiters.values()), None)
        return (
            first is not None
            and first is not sequence
            and step - first.parked_at_step > ROOM_PATIENCE_STEPS
        )

    def is_first_for_room(self, since: int, step: int) -> bool:
        """Whether one that has lacked room since that step has done so for too long, and no waiter
        for longer."""
        first = next(iter(self._room_waiters.values()), None)
        is_longest = first is None or since <= first.parked_at_step
        return is_longest and step - since > ROOM_PATIENCE_STEPS

    def leave(self, sequence: Sequence) -> None:
        """The sequence runs from now on, or has ended: take it out, wherever it is."""
        if sequence.status is Status.WAITING:
            self.dequeue(sequence)
        self._loading.pop(sequence.sequence_id, None)
        if self._room_waiters.pop(sequence.sequence_id, None) is not None:
            sequence.parked_at_step = -1
            # It may have been the one that held the others back.
            self.wake_at_next_chance()

    def check_integrity(self) -> list[Sequence]:
        """Assert that states and places agree; returns all sequences held here."""
        queued = [s for queue in self._queues.values() for s in queue]
        parked = list(self._parked().values())
        assert all(s.status is Status.WAITING and not s.block_table for s in queued)
        assert all(s.status is Status.PARKED and not s.block_table for s in parked)
        return queued + parked

    def _parked(self) -> dict[int, Sequence]:
        # A waiter for room whose adapter had to go meanwhile waits for its loading as well.
        waiters = self._room_waiters.items()
        return self._loading | {i: s for i, s in waiters if s.status is Status.PARKED}
