"""Keeps the adapters that the registry has pinned in the engine's pages."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import redis
from redis.exceptions import RedisError

from openlora.adapters.stores import Store
from openlora.errors import AdapterFailed, OpenLoRAError
from openlora.joblog.crashes import CrashLog
from openlora.protocol.names import ADAPTERS_CHANNEL
from openlora.registry import AdapterRegistry
from workers.engine_client import EngineClient

CHECK_S = 0.5
"""How often the registry is asked whether it has changed: pub/sub keeps nothing for whoever was
away."""
AGAIN_S = 30.0
"""How often all pins are said anew: one that could not be loaded is tried again."""

logger = logging.getLogger("workers.pins")


class PinWatch:
    """A thread that reads the pins; ``apply`` tells the engine, in the thread that owns it.

    Args:
        client: of the registry.
        store: where the adapters are.
        engine: keeps them.
        wake: ends the wait of the thread that calls ``apply``.
    """

    def __init__(
        self,
        client: redis.Redis,
        store: Store,
        engine: EngineClient,
        wake: Callable[[], None],
    ) -> None:
        self._client = client
        self._registry = AdapterRegistry(client)
        self._crash_log = CrashLog(client)
        self._store = store
        self._engine = engine
        self._wake = wake
        self._stop = threading.Event()
        # What was read last, until it was applied; what it was before that matters to nobody.
        self._wanted: deque[tuple[str, ...]] = deque(maxlen=1)
        # Outlives a lost connection: pins that went meanwhile must be told as well.
        self._told: tuple[str, ...] = ()
        self._pinned: tuple[str, ...] = ()
        self._resident: frozenset[str] = frozenset()
        self._thread = threading.Thread(target=self._run, name="pins", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stop.set()

    def under_way(self) -> tuple[str, ...]:
        """What the engine was told to pin, and is not known to have in its pages."""
        return tuple(content for content in self._pinned if content not in self._resident)

    def apply(self, resident: Iterable[str] = ()) -> None:
        """Tell the engine what is pinned now, if that has changed. Raises EngineGone.

        ``resident``: what it has in its pages.
        """
        self._resident = frozenset(resident)
        try:
            wanted = self._wanted.pop()
        except IndexError:
            return
        known = []
        for content in wanted:
            try:
                self._engine.register(content, str(self._store.path(content)))
                known.append(content)
            except AdapterFailed as error:
                logger.warning("event=pin_failed adapter=%s error=%r", content, error.message)
        self._pinned = tuple(known)
        self._engine.pin(self._pinned)
        self._engine.flush()

    def _read(self) -> tuple[str, ...]:
        """Content of what is pinned, but for what ends engines: a new one would load it at once.

        Of those with which one ended, one at a time, so that the next end says which it was.
        """
        found = sorted({record.hash for record in self._registry.pins().values()})
        quarantined = self._crash_log.quarantined(found)
        for content, reason in quarantined.items():
            logger.warning("event=pin_quarantined adapter=%s reason=%r", content, reason)
        suspected = self._crash_log.suspected_pins(found)
        for content in suspected & self._resident:
            self._crash_log.acquit_pin(content)
        left = sorted(suspected - self._resident - quarantined.keys())
        waiting = {*quarantined, *left[1:]}
        return tuple(content for content in found if content not in waiting)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._watch()
            except (RedisError, OSError, OpenLoRAError) as error:
                logger.info("event=pins_not_read error=%r next=again", str(error))
                self._stop.wait(CHECK_S)

    def _watch(self) -> None:
        revision, again_at = -1, 0.0
        pubsub: Any = self._client.pubsub()  # type: ignore[no-untyped-call]
        with pubsub:
            pubsub.subscribe(ADAPTERS_CHANNEL)
            while not self._stop.is_set():
                now, is_due = self._registry.revision(), time.monotonic() >= again_at
                if now != revision or is_due:
                    found = self._read()
                    if found != self._told or (found and is_due):
                        self._wanted.append(found)
                        self._wake()
                    if is_due:
                        again_at = time.monotonic() + AGAIN_S
                    revision, self._told = now, found
                pubsub.get_message(timeout=CHECK_S)
