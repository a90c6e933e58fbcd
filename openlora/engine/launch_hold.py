"""How long the next launch can wait while the device is busy. No I/O; the clock is the caller's.

A step that is launched while the one before it runs keeps the device busy, but whoever asks
meanwhile is in the step behind it. Where only lines of batches run and somebody may ask at any
moment, the next step is launched just before the device needs it.
"""

from __future__ import annotations

from collections.abc import Collection

from openlora.engine.batch_pace import BatchPace
from openlora.engine.step_budget import LaunchedStep

FIRST_MARGIN_S, LEAST_MARGIN_S = 0.001, 0.0002
"""Beside what launching takes: doubled where a launch that waited came too late, for the device
had nothing to do meanwhile, and shortened a little wherever one was in time; what is over the first
one also where none waited."""
_SHORTER = 0.98
MOST_S = 0.02
"""A device that is slower than that gains nothing from steps launched ahead."""
_FORGET = 0.9


class LaunchHold:
    """Watches what launches take, and whether they came in time.

    Attributes:
        margin_s: what a launch is ahead of the device's need, beside its own time.
    """

    def __init__(self, pace: BatchPace) -> None:
        self.margin_s = FIRST_MARGIN_S
        self._pace = pace
        self._launch_s = 0.0
        self._held_behind = 0

    def launched(self, seconds: float, before: LaunchedStep | None) -> None:
        """A step kept the host for so long before it was launched behind ``before``, if any."""
        self._launch_s = max(seconds, _FORGET * self._launch_s)
        held = before if before is not None and before.number == self._held_behind else None
        if held is not None and held.pending.is_done():
            self.margin_s = min(MOST_S, 2 * self.margin_s)
            return
        # A margin longer than a step lets no launch wait that could show that it is too long.
        least_s = min(FIRST_MARGIN_S, self.margin_s) if held is None else LEAST_MARGIN_S
        self.margin_s = max(least_s, _SHORTER * self.margin_s)

    def wait_s(
        self, in_flight: Collection[LaunchedStep], has_interactive: bool, now_s: float
    ) -> float:
        """Seconds for which the next launch can wait; 0 where it must not, or need not.

        ``has_interactive``: somebody waits, or reads along.
        """
        if len(in_flight) != 1 or has_interactive or not self._pace.is_interactive_about(now_s):
            return 0.0
        [step] = in_flight
        # The least that it takes: a launch that comes too late would leave the device idle.
        end_s = self._pace.begin_of(step.began_s) + self._pace.least_of(step.rows)
        wait_s = min(MOST_S, end_s - now_s - self._launch_s - self.margin_s)
        if wait_s <= 0:
            return 0.0
        self._held_behind = step.number
        return wait_s
