"""Which offsets may be committed: only those behind which every job has ended. Pure, no I/O.

Jobs end in any order; Kafka keeps one number per partition. The ledger of a partition remembers
what was taken and gives back the first offset whose job has not ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

SPAN_LIMIT = 10_000
"""Most offsets between a partition's oldest open job and its newest; beyond it, it pauses."""

Partition = tuple[str, int]
"""(topic, partition)."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a job came from. ``incarnation``: which of our ownerships of the partition it was."""

    partition: Partition
    offset: int
    incarnation: int


class OffsetLedger:
    """The offsets taken of one partition during one ownership of it."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self._open: deque[int] = deque()
        self._ended: set[int] = set()
        self._next: int | None = None

    def take(self, offset: int) -> None:
        """An offset was fetched; offsets come in rising order, with holes where Kafka has them.

        Raises:
            ValueError: ``offset`` is not above the last one taken.
        """
        if self._next is not None and offset < self._next:
            raise ValueError(f"offset {offset} taken after {self._next - 1}")
        self._open.append(offset)
        self._next = offset + 1

    def end(self, offset: int) -> None:
        """The job at ``offset`` has ended; a second call changes nothing."""
        if offset in self._ended or not self._open or not self._open[0] <= offset < self.next:
            return
        self._ended.add(offset)
        while self._open and self._open[0] in self._ended:
            self._ended.discard(self._open.popleft())

    @property
    def next(self) -> int:
        """One above the last offset taken; 0 before the first."""
        return self._next or 0

    @property
    def committable(self) -> int | None:
        """The offset to read from after a restart; None before the first offset was taken."""
        if self._open:
            return self._open[0]
        return self._next

    @property
    def span(self) -> int:
        """Offsets from the oldest open job to the newest taken; 0 when all have ended."""
        return self.next - self._open[0] if self._open else 0

    def check_integrity(self) -> None:
        """Assert what always holds: the front is open, ended ones lie behind it."""
        assert not self._open or self._open[0] not in self._ended
        assert all(offset > self._open[0] for offset in self._ended)
        assert list(self._open) == sorted(set(self._open))


class Offsets:
    """The ledgers of all partitions this worker owns."""

    def __init__(self) -> None:
        self._ledgers: dict[Partition, OffsetLedger] = {}
        self._committed: dict[Partition, int] = {}
        self._incarnations = 0

    def assign(self, partitions: Iterable[Partition]) -> None:
        """These partitions are ours from now on, whatever was known of them before."""
        for partition in partitions:
            self._incarnations += 1
            self._ledgers[partition] = OffsetLedger(self._incarnations)
            self._committed.pop(partition, None)

    def revoke(self, partitions: Iterable[Partition]) -> None:
        """These are no longer ours. What their jobs still say about their end is ignored."""
        for partition in partitions:
            self._ledgers.pop(partition, None)
            self._committed.pop(partition, None)

    def take(self, partition: Partition, offset: int) -> Position | None:
        """A message was fetched; None when the partition is not ours (its owner will take it).

        An offset that comes again or lower than before means that the topic began anew: the
        ledger does too, and ends of the old one's jobs are ignored.
        """
        ledger = self._ledgers.get(partition)
        if ledger is None:
            return None
        if offset < ledger.next:
            self.assign([partition])
            ledger = self._ledgers[partition]
        ledger.take(offset)
        return Position(partition, offset, ledger.incarnation)

    def end(self, position: Position) -> None:
        """The job at ``position`` has ended or is no longer our concern."""
        ledger = self._ledgers.get(position.partition)
        if ledger is not None and ledger.incarnation == position.incarnation:
            ledger.end(position.offset)

    def owns(self, position: Position) -> bool:
        """Whether the ownership under which ``position`` was taken still lasts."""
        ledger = self._ledgers.get(position.partition)
        return ledger is not None and ledger.incarnation == position.incarnation

    def to_commit(self) -> dict[Partition, int]:
        """Partitions whose committable offset is above what was last committed."""
        pending = {}
        for partition, ledger in self._ledgers.items():
            offset = ledger.committable
            if offset is not None and offset > self._committed.get(partition, -1):
                pending[partition] = offset
        return pending

    def committed(self, offsets: dict[Partition, int]) -> None:
        """The broker took these; partitions given up meanwhile are ignored."""
        for partition, offset in offsets.items():
            if partition in self._ledgers:
                self._committed[partition] = max(offset, self._committed.get(partition, -1))

    def committed_offset(self, partition: Partition) -> int | None:
        """What was last committed under this ownership; None before the first commit."""
        return self._committed.get(partition)

    def first_open(self, partition: Partition) -> int | None:
        """What could be committed now; None where nothing was taken or it is not ours."""
        ledger = self._ledgers.get(partition)
        return None if ledger is None else ledger.committable

    def span(self, partition: Partition) -> int:
        """The partition's span; 0 where it is not ours."""
        ledger = self._ledgers.get(partition)
        return 0 if ledger is None else ledger.span

    def partitions(self) -> tuple[Partition, ...]:
        """What is ours."""
        return tuple(self._ledgers)

    def check_integrity(self) -> None:
        """Assert what always holds: nothing committed beyond an open job."""
        for partition, ledger in self._ledgers.items():
            ledger.check_integrity()
            committed = self._committed.get(partition)
            if committed is not None and ledger.committable is not None:
                assert committed <= ledger.committable
