"""Sequences of one priority that could start now: whose turn it is. Pure and deterministic.

Tenants share the seats: first comes the tenant that has the fewest. Within a tenant nobody's flood
of one adapter keeps another waiting (see fair_line.py). A single tenant with a mixed load, as where
the engine is used by itself, is served in the order of arrival.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from openlora.engine.fair_line import FairLine
from openlora.engine.sequence import Sequence

_REMEMBERED = 1024


class FairQueue:
    """Holds sequences, each with its place in its tenant's line.

    Args:
        by_adapter: whether a tenant's adapters share its turns, or come as they were added.
    """

    def __init__(self, *, by_adapter: bool) -> None:
        self._by_adapter = by_adapter
        self._lines: dict[str, FairLine[Sequence]] = {}
        self._empty: dict[str, FairLine[Sequence]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line.all()

    def first(self, running: Collection[Sequence] = ()) -> Sequence | None:
        """The next to start beside ``running``; the oldest of those whose tenants are level."""
        if len(self._lines) <= 1:
            for line in self._lines.values():
                return line.first()
            return None
        seats = Counter(sequence.tenant for sequence in running)
        heads = (line.first() for line in self._lines.values())
        return min(heads, key=lambda head: (seats[head.tenant], head.sequence_id))

    def add(self, sequence: Sequence) -> None:
        """One that is new has its place from now on; one that was here before has it still."""
        tenant = sequence.tenant
        if tenant not in self._lines:
            is_known = tenant in self._empty
            self._lines[tenant] = self._empty.pop(tenant) if is_known else FairLine()
        line = self._lines[tenant]
        if sequence.place is None:
            owner = tuple(key for key, _ in sequence.adapters) if self._by_adapter else None
            sequence.place = line.place(owner, sequence.sequence_id)
        line.add(sequence.place, sequence)
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        """Take out one that is here."""
        line = self._lines[sequence.tenant]
        assert sequence.place is not None
        line.remove(sequence.place)
        self._count -= 1
        if not len(line):
            del self._lines[sequence.tenant]
            self._empty[sequence.tenant] = line
            if len(self._empty) > _REMEMBERED:
                del self._empty[next(iter(self._empty))]

    def serve(self, sequence: Sequence) -> None:
        """It runs from now on."""
        assert sequence.place is not None
        for lines in (self._lines, self._empty):
            if sequence.tenant in lines:
                lines[sequence.tenant].serve(sequence.place)
