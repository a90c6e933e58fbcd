"""Notices that the group does not let this worker in. Pure.

The embedded broker can get two members to join in turns: each join makes the other's answer stale,
for ever. It ends when one of them leaves for a while; which one, chance decides.
"""

from __future__ import annotations

import random

PATIENCE_S = 12.0
"""Longer than any join that comes to something: a session that has to run out, and two rounds."""
SPREAD_S = 8.0


class JoinWatch:
    """Asked before each poll. ``chance``: where each worker's own moment comes from."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._due: float | None = None

    def is_stuck(self, *, joined: bool, now: float) -> bool:
        """Whether to leave and join anew; then it counts from ``now`` again."""
        if joined:
            self._due = None
        elif self._due is None or now >= self._due:
            is_late = self._due is not None
            self._due = now + PATIENCE_S + self._chance.uniform(0, SPREAD_S)
            return is_late
        return False

    def pause_s(self) -> float:
        """How long to stay away, so that others can finish their round."""
        return self._chance.uniform(SPREAD_S / 4, SPREAD_S)
