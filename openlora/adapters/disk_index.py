"""What a directory of adapters holds, as it is remembered: sizes and last uses.

A directory is named by the hash of its content, so its size is asked for once. Its last use is its
modification time, which whoever uses it sets and which only grows: what is remembered of it is
never too late, and whoever evicts looks again at the one that comes first, and at no other.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

RESCAN_S = 2.0
"""So long what other processes bring or evict may go unnoticed. A look gives the interpreter's lock
up at each adapter: at each fetch, it would take longer than the copy and hold up the engine."""
RESCAN_BROUGHT = 8
"""Likewise so many adapters that this process brings: the others may bring as many meanwhile."""
_HASH = re.compile(r"[0-9a-f]{64}")


def is_content_hash(name: str) -> bool:
    """Whether a directory of this name is an adapter's."""
    return _HASH.fullmatch(name) is not None


def size_of(directory: Path) -> int:
    """Bytes of its files."""
    return sum(entry.stat().st_size for entry in os.scandir(directory))


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter.

    Attributes:
        size: of its files, in bytes.
        used_ns: its last known use, in ns since 1970; never later than its last use.
        is_here: False while it is about to be placed.
        fresh_until: it has not been read since it was fetched, and until when (``time.monotonic``)
            it stays for that; None: it has been.
        queued_ns: what it is queued with; None: it is not queued.
    """

    name: str
    size: int
    used_ns: int
    is_here: bool = True
    fresh_until: float | None = None
    queued_ns: int | None = None


class DiskIndex:
    """The adapters below ``root`` and their order of use. Thread-safe; no file is touched while
    its lock is held."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._bytes = 0
        # An entry is there once, with a use that may be out of date: a use only sets a number.
        self._queue: list[tuple[int, str]] = []
        self._scanning = threading.Lock()
        self._rescan_at = 0.0
        self._brought = 0  # since the last scan
        self._changed: set[str] = set()  # came or went since the last scan began

    @property
    def num_bytes(self) -> int:
        """Of all that is there, or about to be placed."""
        return self._bytes

    def snapshot(self) -> list[tuple[str, int]]:
        """(name, bytes) of all that is there, the longest unused first."""
        with self._lock:
            here = [e for e in self._entries.values() if e.is_here]
            here.sort(key=lambda entry: (entry.used_ns, entry.name))
            return [(entry.name, entry.size) for entry in here]

    def expect(self, name: str, size: int) -> None:
        """It is about to be placed, and counts already."""
        with self._lock:
            self._brought += 1
            self._put(Entry(name, size, 0, is_here=False))

    def placed(self, name: str, size: int, used_ns: int, fresh_until: float | None = None) -> None:
        """It is there."""
        with self._lock:
            self._put(Entry(name, size, used_ns, fresh_until=fresh_until))

    def keep(self, name: str, fresh_until: float) -> bool:
        """Somebody is about to read it; False where it is not known."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None:
                entry.fresh_until = fresh_until
            return entry is not None

    def used(self, name: str, used_ns: int) -> bool:
        """It is read; whether for the first time since it was fetched."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return False
            entry.used_ns = max(entry.used_ns, used_ns)
            was_fresh, entry.fresh_until = entry.fresh_until is not None, None
            return was_fresh

    def forget(self, name: str, only: Entry | None = None) -> None:
        """It is gone, or did not come; ``only``: unless this is not what is known of it now."""
        with self._lock:
            if only is None or self._entries.get(name) is only:
                self._changed.add(name)
                self._drop(name)

    def pop_oldest(self) -> Entry | None:
        """What is known as the longest unused; it is not queued until it is put back."""
        with self._lock:
            while self._queue:
                queued_ns, name = heapq.heappop(self._queue)
                entry = self._entries.get(name)
                if entry is None or entry.queued_ns != queued_ns:
                    continue  # of one that has gone
                if entry.used_ns <= queued_ns:
                    entry.queued_ns = None
                    return entry
                self._enqueue(entry)
            return None

    def put_back(self, entry: Entry, used_ns: int = 0) -> None:
        """Queue it again, unless it is or has gone; ``used_ns``: a use that was found."""
        with self._lock:
            if self._entries.get(entry.name) is entry and entry.queued_ns is None:
                entry.used_ns = max(entry.used_ns, used_ns)
                self._enqueue(entry)

    def rescan(self, *, at_once: bool = False) -> None:
        """See what other processes brought and evicted, where the last look is ``RESCAN_S`` or
        ``RESCAN_BROUGHT`` ago; ``at_once``: in any case. Nobody waits for a look that another
        thread has begun.

        Raises:
            OSError: the directory cannot be listed.
        """
        if not at_once and not self._is_due():
            return
        if not self._scanning.acquire(blocking=False):
            return
        try:
            if at_once or self._is_due():
                started = time.monotonic()
                self._brought = 0
                self._scan()
                # Of the beginning: what came behind that may have been missed.
                self._rescan_at = started + RESCAN_S
        finally:
            self._scanning.release()

    def _is_due(self) -> bool:
        return time.monotonic() >= self._rescan_at or self._brought >= RESCAN_BROUGHT

    def _scan(self) -> None:
        with self._lock:
            self._changed.clear()
        names = {name for name in os.listdir(self._root) if is_content_hash(name)}
        with self._lock:
            unknown = names - self._entries.keys()
        found = []
        for name in unknown:
            with contextlib.suppress(FileNotFoundError):
                path = self._root / name
                found.append(Entry(name, size_of(path), path.stat().st_mtime_ns))
        with self._lock:
            gone = [e.name for e in self._entries.values() if e.is_here and e.name not in names]
            # What this process did meanwhile, the listing may or may not show.
            for name in set(gone) - self._changed:
                self._drop(name)
            for entry in found:
                if entry.name not in self._entries and entry.name not in self._changed:
                    self._put(entry)
            if gone:  # what they were queued with would stay where this process evicts nothing
                self._queue = [
                    (entry.queued_ns, entry.name)
                    for entry in self._entries.values()
                    if entry.queued_ns is not None
                ]
                heapq.heapify(self._queue)

    def _put(self, entry: Entry) -> None:
        self._changed.add(entry.name)
        self._drop(entry.name)
        self._entries[entry.name] = entry
        self._bytes += entry.size
        if entry.is_here:
            self._enqueue(entry)

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._bytes -= entry.size

    def _enqueue(self, entry: Entry) -> None:
        entry.queued_ns = entry.used_ns
        heapq.heappush(self._queue, (entry.used_ns, entry.name))
