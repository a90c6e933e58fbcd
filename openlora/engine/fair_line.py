"""A line in which nobody's flood keeps others waiting. Pure and deterministic.

What waits belongs to an owner, as to the users of one adapter. First come is first served, but what
one owner puts here faster than its share is served comes later, in rows of ``IN_A_ROW``, behind
what others put here until that row's time has come. So the order of a mixed load is that of its
arrival, and a flood costs others ``IN_A_ROW`` places at most, however long it is.

The clock is that of start-time fair queueing (Goyal, Vin, Cheng 1996), which each service moves on
by an owner's share of it at least, so that those who come once do not keep it where it is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

IN_A_ROW = 64
_REMEMBERED = 1024


class Place(NamedTuple):
    """Where something stands: smaller is served before. ``tick``: its time by the line's clock."""

    row: int
    age: int
    tick: float
    owner: Hashable


class FairLine(Generic[T]):
    """Things that wait, each with a place of its own; ``age``s are unique."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._things: dict[Place, T] = {}
        self._owners: Counter[Hashable] = Counter()
        self._clock = 0.0
        self._last: dict[Hashable, float] = {}

    def __len__(self) -> int:
        return len(self._places)

    def place(self, owner: Hashable, age: int) -> Place:
        """A new place for something of ``owner``."""
        tick = max(self._clock, self._last.get(owner, -1.0) + 1)
        self._last[owner] = tick
        if len(self._last) > _REMEMBERED + len(self._places):
            # An owner whose last tick is past gets the clock's, as one that was never here.
            self._last = {who: last for who, last in self._last.items() if last >= self._clock}
        return Place(int(tick // IN_A_ROW), age, tick, owner)

    def add(self, place: Place, thing: T) -> None:
        """Put it there; it may have been away from there for a while."""
        insort(self._places, place)
        self._things[place] = thing
        self._owners[place.owner] += 1

    def first(self) -> T:
        """What is served next; something must be here."""
        return self._things[self._places[0]]

    def pop(self) -> T:
        """Serve what is first."""
        place = self._places[0]
        thing = self._things[place]
        self.remove(place)
        self.serve(place)
        return thing

    def remove(self, place: Place) -> None:
        """Take out what stands there; ``serve`` tells if that is to be served."""
        del self._places[bisect_left(self._places, place)]
        del self._things[place]
        self._owners[place.owner] -= 1
        if not self._owners[place.owner]:
            del self._owners[place.owner]

    def serve(self, place: Place) -> None:
        """What had this place is served now, and is not here any more."""
        share = 1 / (len(self._owners) + (place.owner not in self._owners))
        self._clock = max(self._clock + share, place.tick)

    def all(self) -> list[T]:
        """Everything, in the order in which it is served."""
        return [self._things[place] for place in self._places]
