"""Which adapters leave the disk tier, and how: renamed away whole, then deleted. Thread-safe."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from openlora.adapters.content_locks import ContentLocks
from openlora.adapters.disk_index import DiskIndex, Entry
from openlora.adapters.tier_stats import TierCounter

STALE_S = 3600.0
_TRASH = ".trash-"


class DiskEviction:
    """The longest unused of ``root`` go, never one that somebody has locked.

    Args:
        root: of the cache.
        index: what is known to be there.
        locks: by content hash.
        counter: of evictions.
        max_bytes: the budget.
    """

    def __init__(
        self,
        root: Path,
        index: DiskIndex,
        locks: ContentLocks,
        counter: TierCounter,
        max_bytes: int,
    ) -> None:
        self._root = root
        self._index = index
        self._locks = locks
        self._counter = counter
        self._max_bytes = max_bytes
        # One thread at a time: two would take each other's victims for ones that are being read,
        # and evict younger ones.
        self._evicting = threading.Lock()

    def trim(self) -> None:
        """Until what is there, or about to be placed, fits the budget; none that waits for its
        first reading.

        Raises:
            OSError: the directory cannot be listed.
        """
        self._index.rescan()
        self._evict_oldest(lambda _: self._index.num_bytes <= self._max_bytes)

    def make_room(self) -> bool:
        """The disk is full before the budget is: a quarter of what is there; whether any went.
        Raises as ``trim``."""
        self._index.rescan(at_once=True)
        wanted = max(1, len(self._index.snapshot()) // 4)
        return self._evict_oldest(lambda gone: gone >= wanted, also_fresh=True) > 0

    def evict(self, path: Path) -> bool:
        """This one, unless somebody has it; whether it went."""
        trash = self._set_aside(path)
        if trash is not None:
            shutil.rmtree(trash, ignore_errors=True)
        return trash is not None

    def sweep(self, incoming: str) -> None:
        """Delete what processes that died left half deleted, or half fetched in directories whose
        names start with ``incoming``."""
        for path in self._root.iterdir():
            is_half = path.name.startswith((incoming, _TRASH))
            if is_half and time.time() - path.stat().st_mtime >= STALE_S:
                shutil.rmtree(path, ignore_errors=True)

    def _evict_oldest(self, is_enough: Callable[[int], bool], *, also_fresh: bool = False) -> int:
        """Evict the longest unused one after the other until ``is_enough`` of how many went, or
        none is left that may go; how many went."""
        if is_enough(0):
            return 0
        gone: list[Path] = []
        seen: list[Entry] = []
        with self._evicting:
            try:
                while not is_enough(len(gone)) and (entry := self._index.pop_oldest()) is not None:
                    seen.append(entry)
                    is_fresh = (entry.fresh_until or 0.0) > time.monotonic()
                    if (also_fresh or not is_fresh) and self._is_oldest(entry):
                        trash = self._set_aside(self._root / entry.name)
                        if trash is not None:
                            gone.append(trash)
            finally:
                for entry in seen:
                    self._index.put_back(entry)
        # Behind the lock: it takes the longest, and holds nobody up.
        for trash in gone:
            shutil.rmtree(trash, ignore_errors=True)
        return len(gone)

    def _is_oldest(self, entry: Entry) -> bool:
        """Whether it was not used since its last known use; else it takes its place anew."""
        try:
            used_ns = (self._root / entry.name).stat().st_mtime_ns
        except FileNotFoundError:
            self._index.forget(entry.name, entry)  # another process evicted it
            return False
        if used_ns > entry.used_ns:
            self._index.put_back(entry, used_ns)
            return False
        return True

    def _set_aside(self, path: Path) -> Path | None:
        """Where it is now, to be deleted; None: it stays, as somebody has it, or was gone."""
        with self._locks.alone_now(path.name) as is_mine:
            if not is_mine:
                return None
            trash = self._root / f"{_TRASH}{path.name}-{time.time_ns()}"
            try:
                path.rename(trash)
                is_here = True
            except FileNotFoundError:
                is_here = False  # another process was faster
            self._index.forget(path.name)
            self._locks.remove(path.name)
        if is_here:
            self._counter.evicted()
        return trash if is_here else None
