"""How long the next launch can wait while the device is busy. No I/O; the clock is the caller's.

A step that is launched while the one before it runs keeps the device busy, but whoever asks
meanwhile is in the step behind it. Where only lines of batches run and somebody may ask at any
moment, the next step is launched just before the device needs it.
"""

from __future__ import annotations

from collections.abc import Collection

from openlora.engine.batch_pace import BatchPace
from openlora.engine.step_budget import LaunchedStep

MARGIN_S = 0.001
"""Beside twice of what launching takes: the host must not be late. Where the last launches took
long, as those with prompts do, nothing is held."""
MOST_S = 0.02
"""A device that is slower than that gains nothing from steps launched ahead."""
_FORGET = 0.9


class LaunchHold:
    """Watches what launches take."""

    def __init__(self, pace: BatchPace) -> None:
        self._pace = pace
        self._launch_s = 0.0

    def launched(self, seconds: float) -> None:
        """A launch kept the host for so long."""
        self._launch_s = max(seconds, _FORGET * self._launch_s)

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
        decodes = sum(row.num_tokens == 1 for row in step.rows)
        end_s = self._pace.begin_of(step.began_s) + self._pace.least_s(decodes)
        return min(MOST_S, max(0.0, end_s - now_s - 2 * self._launch_s - MARGIN_S))
