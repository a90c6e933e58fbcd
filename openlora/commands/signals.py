"""Signals of a supervising process: what ends a wait, and how often it was asked to stop."""

from __future__ import annotations

import select
import signal
import socket
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Handlers for SIGINT, SIGTERM, SIGHUP and SIGCHLD while in the ``with`` block.

    Until ``hold`` is called, a stop signal raises KeyboardInterrupt, so that any step of a start
    can be left. From then on it is only counted: a drain must not be torn out of its order.
    Main thread only.
    """

    def __init__(self) -> None:
        self.stops = 0
        self._held = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            # nohup ignores SIGHUP for us, and means it; an ignored SIGINT is only a shell's way
            # to shield background jobs from Ctrl-C, and a `kill -INT` must still drain.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_stop)
        # A handler must exist for SIGCHLD to reach the wake-up socket; wait() does the work.
        self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def hold(self) -> None:
        """From now on stop signals are counted, not raised."""
        self._held = True

    def wait(self, timeout_s: float | None) -> None:
        """Return at the next signal (a child's death included) or after ``timeout_s``."""
        readable, _, _ = select.select([self._reader], [], [], timeout_s)
        if readable:
            self._reader.recv(4096)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.stops += 1
        if not self._held:
            self._held = True
            raise KeyboardInterrupt
