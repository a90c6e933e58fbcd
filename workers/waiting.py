"""How the loop's thread waits: for the engine's socket, or for another thread that wakes it."""

from __future__ import annotations

import os
import selectors

from workers.engine_client import EngineClient


class Waiting:
    """``wait`` is the loop's thread's alone; ``wake`` may be called from any thread."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(engine.sock, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._watches_write = False

    def wait(self, timeout_s: float) -> None:
        """Return when the engine says something or takes what waits for it, or after ``wake``."""
        wants_write = self._engine.wants_write
        if wants_write != self._watches_write:
            self._watches_write = wants_write
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants_write else 0)
            self._selector.modify(self._engine.sock, events)
        for key, _ in self._selector.select(timeout_s):
            if key.fd == self._wake_read:
                os.read(self._wake_read, 4096)

    def wake(self) -> None:
        """End the wait that is, or the next one."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            return  # a wake-up is waiting already

    def close(self) -> None:
        """Free selector and pipe."""
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
