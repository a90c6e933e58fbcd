"""What was fetched and waits for room, and how much room there is. No I/O."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from openlora.engine.fair_line import FairLine
from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from workers.budgets import Budgets
from workers.offsets import Partition, Position

WINDOW_MESSAGES = 4096
WINDOW_BYTES = 64 << 20
"""How much of the interactive topic waits here: tenants and adapters in it take turns, whatever
the order of their messages in the partitions. What one tenant may have under way fits twice."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """One message of a job topic."""

    position: Position
    key: bytes | None
    value: bytes


class Backlog:
    """Messages handed on as the budgets allow; interactive first, in turns of tenants and adapters.

    What exceeds the budgets waits here and not in kafka-python: records that it holds itself for a
    paused partition may never come out again after the resume (3.0.12 puts them back only if its
    slot for the next partition is None, and it often is an empty one).
    """

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._jobs = Turns()
        self._batch: deque[Fetched] = deque()
        self._held = {JOBS_TOPIC: 0, BATCH_TOPIC: 0}

    def add(self, fetched: Fetched) -> None:
        """One more message waits."""
        if fetched.position.partition[0] == JOBS_TOPIC:
            self._jobs.add(fetched)
        else:
            self._batch.append(fetched)

    def take(self, owns: Callable[[Position], bool]) -> list[Fetched]:
        """What there is room for now; messages of partitions that are no longer ours are dropped.

        What is taken counts as held until ``free``.
        """
        batch = []
        while len(self._jobs) and JOBS_TOPIC not in self._full():
            batch += self._hold(self._jobs.take(), owns)
        while self._batch and BATCH_TOPIC not in self._full():
            batch += self._hold(self._batch.popleft(), owns)
        return batch

    def _hold(self, fetched: Fetched, owns: Callable[[Position], bool]) -> list[Fetched]:
        if not owns(fetched.position):
            return []
        self._held[fetched.position.partition[0]] += 1
        return [fetched]

    def free(self, topic: str) -> None:
        """A held message of ``topic`` needs nothing more."""
        self._held[topic] -= 1

    def full_topics(self) -> frozenset[str]:
        """Topics to fetch nothing from: enough of them waits here already."""
        full = set()
        if len(self._jobs) >= WINDOW_MESSAGES or self._jobs.bytes >= WINDOW_BYTES:
            full.add(JOBS_TOPIC)
        if self._batch or BATCH_TOPIC in self._full():
            full.add(BATCH_TOPIC)
        return frozenset(full)

    @property
    def waits(self) -> bool:
        """Whether messages wait here for room."""
        return bool(len(self._jobs) or self._batch)

    def first_offsets(self) -> dict[Partition, int]:
        """Per partition, the smallest offset of the messages that wait here."""
        first: dict[Partition, int] = {}
        for fetched in itertools.chain(self._jobs, self._batch):
            partition, offset = fetched.position.partition, fetched.position.offset
            first[partition] = min(offset, first.get(partition, offset))
        return first

    def _full(self) -> frozenset[str]:
        return self._budgets.full_topics(self._held[JOBS_TOPIC], self._held[BATCH_TOPIC])


class _Whose(msgspec.Struct):
    tenant: str = ""


_decode_whose = msgspec.json.Decoder(_Whose).decode


class Turns:
    """Messages of jobs: tenants take turns, and within a tenant adapters as ``FairLine`` says.

    Attributes:
        bytes: size of all that wait.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._lines: dict[str, FairLine[Fetched]] = {}
        self._count = 0
        self._ages = itertools.count()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Fetched]:
        for line in self._lines.values():
            yield from line.all()

    def add(self, fetched: Fetched) -> None:
        """Behind what its tenant and adapter have here."""
        line = self._lines.setdefault(_tenant_of(fetched.value), FairLine())
        line.add(line.place(fetched.key, next(self._ages)), fetched)
        self._count += 1
        self.bytes += len(fetched.value)

    def take(self) -> Fetched:
        """The next one; something must be here."""
        tenant, line = next(iter(self._lines.items()))
        fetched = line.pop()
        del self._lines[tenant]
        if len(line):
            self._lines[tenant] = line  # behind the others
        self._count -= 1
        self.bytes -= len(fetched.value)
        return fetched


def _tenant_of(value: bytes) -> str:
    """Of a message that is no job nobody's: it is told apart when its turn comes."""
    try:
        return _decode_whose(value).tenant
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return ""
