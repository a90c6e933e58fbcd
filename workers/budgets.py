"""How many jobs a worker holds at once, and which topics wait. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC


@dataclass(frozen=True, slots=True)
class Budgets:
    """Most jobs held at once, those waiting in the engine included.

    Batch jobs have their own, smaller share, and none while interactive jobs alone have used up
    half of theirs: batch pauses first, so it never takes the room of somebody who watches.
    """

    interactive: int
    batch: int

    def full_topics(self, interactive: int, batch: int) -> frozenset[str]:
        """The topics to take nothing from, given the jobs held of each kind."""
        paused = set()
        if interactive >= self.interactive:
            paused.add(JOBS_TOPIC)
        if batch >= self.batch or 2 * interactive >= self.interactive:
            paused.add(BATCH_TOPIC)
        return frozenset(paused)
