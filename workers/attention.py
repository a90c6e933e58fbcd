"""How often the consumer looks for messages. A thread's waits, and what ends them; no Kafka."""

from __future__ import annotations

import threading
import time

from openlora.joblog.hints import HOLDS_S

QUIET_AFTER_S = 2.0
QUIET_PAUSE_S = 0.5
"""Looking 50 times a second costs 3 % of a core here and 5 % at an embedded broker of 32 partitions
that nothing comes to. A worker that got no interactive job for a while waits for a hint that there
is one (joblog/hints.py), and looks twice a second in case that one was lost."""
DEAF_AFTER_S = 30.0
DEAF_PAUSE_S = 0.08
"""The same where hints are not heard: the next job waits up to that much longer, those after it do
not."""
FLOW_PAUSE_S = 0.08
"""The same while bundles come: all that are there come at once, and more may follow."""


class Attention:
    """``hint``, ``hears_hints`` and ``wake`` may be called by any thread, the rest by one."""

    def __init__(self) -> None:
        self._wake = threading.Event()
        self._is_woken = False  # a pause was ended, and whoever polls has not had its turn since
        self._hears_hints = False
        self._hinted_until = 0.0
        self._last_job = -DEAF_AFTER_S  # none yet

    def hint(self) -> None:
        """Messages may be there."""
        self._hinted_until = time.monotonic() + HOLDS_S
        self._wake.set()

    def hears_hints(self, heard: bool) -> None:
        """Whether ``hint`` is called where messages come."""
        self._hears_hints = heard

    def wake(self) -> None:
        """End the wait that goes on, or the next one."""
        self._wake.set()

    def took_job(self) -> None:
        """An interactive job came: others may follow."""
        self._last_job = time.monotonic()

    @property
    def is_quiet(self) -> bool:
        """Whether no interactive job came for a while."""
        after_s = QUIET_AFTER_S if self._hears_hints else DEAF_AFTER_S
        return time.monotonic() - self._last_job > after_s

    def pause(self, seconds: float) -> bool:
        """Wait; True where ``hint`` or ``wake`` ended it."""
        self._is_woken = bool(self._wake.wait(seconds))
        self._wake.clear()
        return self._is_woken

    def rest(self, *, batch_flows: bool) -> None:
        """Wait before the next look, where quiet; not at all behind a hint, nor where the pause
        before was ended: what it was ended for is still to be done."""
        is_woken, self._is_woken = self._is_woken, False
        if is_woken or time.monotonic() < self._hinted_until:
            return
        pause_s = QUIET_PAUSE_S if self._hears_hints else DEAF_PAUSE_S
        self.pause(FLOW_PAUSE_S if batch_flows else pause_s)
        self._is_woken = False  # the next poll comes at once
