"""Adapters of a remote store on local disk: the disk tier. Thread-safe, shared by processes.

    root/<hash>/         the files of the adapter with that content hash, checked against it
    root/.locks/<hash>   held shared by whoever reads it, alone by whoever fetches or evicts it
    root/.incoming-…, .trash-…     what is being fetched, or deleted
    root/.quarantine/<hash>        what the store gave for an adapter and was another content

An adapter appears in one rename, after its SHA-256 was found to be its name. The longest unused go
when the budget is exceeded, never one that somebody reads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event

from openlora.adapters.adapter_source import Cancelled, Evicted, Source
from openlora.adapters.content_locks import ContentLocks
from openlora.adapters.peft_format import inspect_adapter
from openlora.adapters.quarantine import QUARANTINE, keep_aside
from openlora.adapters.tier_stats import TierCounter, TierStats
from openlora.errors import AdapterFailed

BACK_OFF_S = (0.25, 0.5, 1.0, 2.0)
"""Waits between the attempts at a store that does not answer, or answers wrongly."""
REFUSED_S = 30.0
"""What the store has in other bytes than its name says is not asked for again so soon."""
STALE_S = 3600.0
_HASH = re.compile(r"[0-9a-f]{64}")
_INCOMING, _TRASH, _LOCKS = ".incoming-", ".trash-", ".locks"

logger = logging.getLogger(__name__)


class DiskCache:
    """The adapters below ``root``.

    Args:
        root: of this cache alone; several processes may use it.
        source: what is asked for an adapter that is not here.
        max_bytes: the budget.
        back_off_s: waits between attempts.
    """

    def __init__(
        self,
        root: Path,
        source: Source,
        max_bytes: int,
        back_off_s: tuple[float, ...] = BACK_OFF_S,
    ) -> None:
        self.root = Path(root)
        self._source = source
        self._max_bytes = max_bytes
        self._back_off_s = back_off_s
        self._locks = ContentLocks(self.root / _LOCKS)
        self._counter = TierCounter()
        self._refused: dict[str, tuple[float, str]] = {}
        self._sizes: dict[str, int] = {}
        self._fresh: dict[str, float] = {}  # not read yet, and until when it stays for that
        with contextlib.suppress(OSError):
            self._rescan()
            self._sweep()

    def path(self, content_hash: str) -> Path:
        """Where it is, or will be."""
        return self.root / content_hash

    def owns(self, path: Path) -> bool:
        """Whether ``path`` is an adapter's place in this cache."""
        return path.parent == self.root and _HASH.fullmatch(path.name) is not None

    def has(self, path: Path) -> bool:
        """Whether it is there now; counts nothing."""
        return path.is_dir()

    def ensure(self, path: Path, cancelled: Event | None = None, keep_s: float = 0.0) -> None:
        """Have the adapter of ``path`` on disk; waits for whoever fetches it already. Until it is
        read, and no longer than ``keep_s``, it stays there also where that is over the budget.

        Raises:
            AdapterFailed: the store lacks it, does not answer, or has other bytes; or the disk is
                full, or the budget too small.
            Cancelled: ``cancelled`` was set meanwhile.
        """
        if path.is_dir():
            return
        self._check_refused(path.name)
        started = time.perf_counter()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._locks.alone(path.name):
                try:
                    if not path.is_dir():
                        self._bring(path, cancelled or Event())
                finally:
                    if not path.is_dir():
                        self._locks.remove(path.name)
            self._counter.loaded(time.perf_counter() - started)
            self._fresh[path.name] = time.monotonic() + keep_s
        except AdapterFailed:
            self._counter.failed()
            raise
        except OSError as error:
            self._counter.failed()
            raise AdapterFailed(
                f"the adapter cache {self.root} cannot be written: {error}; free space there, or "
                "name another folder with OPENLORA_ADAPTER_CACHE"
            ) from error
        self.trim()

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Keep the adapter of ``path`` in place.

        Raises:
            Evicted: it is not there any more.
        """
        with self._locks.shared(path.name):
            if not path.is_dir():
                self._locks.remove(path.name)
                raise Evicted(f"adapter {path.name} went before it was read")
            if self._fresh.pop(path.name, None) is None:  # else this is what it was fetched for
                self._counter.hit()
            with contextlib.suppress(OSError):
                os.utime(path)
            yield

    def drop_damaged(self, paths: Iterable[Path]) -> bool:
        """Delete those that hold other content than was fetched; whether there were any."""
        dropped = False
        for path in paths:
            if path.is_dir() and _content_of(path) != path.name:
                logger.warning("the copy of adapter %s is damaged; fetched anew", path)
                dropped |= self._evict(path)
        return dropped

    def trim(self, room: int = 0) -> None:
        """Delete the longest unused until ``room`` more bytes fit the budget."""
        entries = self._rescan()
        left = sum(size for _, size, _ in entries) + room
        for _, size, path in entries:
            is_fresh = self._fresh.get(path.name, 0.0) > time.monotonic()
            if left > self._max_bytes and not is_fresh and self._evict(path):
                left -= size

    def stats(self) -> TierStats:
        """As of this process; what others brought is seen at the next load."""
        sizes = self._sizes
        return self._counter.stats(
            "disk",
            adapters=len(sizes),
            bytes_used=sum(sizes.values()),
            bytes_limit=self._max_bytes,
            names=tuple(sizes),
        )

    def _bring(self, path: Path, cancelled: Event) -> None:
        """Attempts with pauses between them, until one gives the right bytes."""
        for pause_s in (*self._back_off_s, None):
            try:
                self._attempt(path, cancelled)
                return
            except _Again as failure:
                if pause_s is None:
                    if failure.is_wrong:
                        self._refuse(path.name, str(failure))
                    raise AdapterFailed(str(failure)) from failure
                logger.warning("%s; tried again in %g s", failure, pause_s)
                if cancelled.wait(pause_s):
                    raise Cancelled from failure

    def _attempt(self, path: Path, cancelled: Event) -> None:
        with tempfile.TemporaryDirectory(prefix=_INCOMING, dir=self.root) as temporary:
            copy = Path(temporary) / "adapter"
            copy.mkdir()
            try:
                self._source.fetch(path.name, copy, cancelled)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    if self._make_room():
                        raise _Again(f"the disk of {self.root} was full", is_wrong=False) from error
                    raise
                raise _Again(
                    f"the adapter store {self._source.name} does not give adapter {path.name}: "
                    f"{_words(error)}; try again, and see whether it can be reached from here",
                    is_wrong=False,
                ) from error
            self._check(path, copy)
            size = _size_of(copy)
            if size > self._max_bytes:
                raise AdapterFailed(
                    f"adapter {path.name} has {size} bytes; the adapter cache may hold "
                    f"{self._max_bytes} (OPENLORA_ADAPTER_CACHE_BYTES): raise that"
                )
            self.trim(room=size)
            copy.rename(path)

    def _check(self, path: Path, copy: Path) -> None:
        found = _content_of(copy)
        if found == path.name:
            return
        place = keep_aside(copy, self.root / QUARANTINE, path.name)
        logger.warning("what the store gave for adapter %s is kept in %s", path.name, place)
        raise _Again(
            f"the adapter store {self._source.name} gives other bytes for adapter {path.name} "
            f"(SHA-256 {found}); add the adapter again",
            is_wrong=True,
        )

    def _refuse(self, content_hash: str, message: str) -> None:
        now = time.monotonic()
        # Those whose time is over are asked for again: nothing of them is kept.
        still = {name: entry for name, entry in self._refused.items() if entry[0] > now}
        self._refused = still | {content_hash: (now + REFUSED_S, message)}

    def _check_refused(self, content_hash: str) -> None:
        until, message = self._refused.get(content_hash, (0.0, ""))
        if time.monotonic() < until:
            self._counter.failed()
            raise AdapterFailed(message)
        self._refused.pop(content_hash, None)

    def _make_room(self) -> bool:
        """The disk is full before the budget is: delete a quarter of what is here."""
        entries = self._rescan()
        gone = 0
        for _, _, path in entries:
            gone += self._evict(path)
            if gone >= max(1, len(entries) // 4):
                break
        return gone > 0

    def _evict(self, path: Path) -> bool:
        with self._locks.alone_now(path.name) as is_mine:
            if not is_mine:
                return False
            trash = self.root / f"{_TRASH}{path.name}-{time.time_ns()}"
            try:
                path.rename(trash)
            except FileNotFoundError:
                return False  # another process was faster
            self._counter.evicted()
            self._fresh.pop(path.name, None)
            self._sizes = {name: size for name, size in self._sizes.items() if name != path.name}
            shutil.rmtree(trash, ignore_errors=True)
            self._locks.remove(path.name)
            return True

    def _rescan(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of all that is here, the longest unused first."""
        found = []
        for entry in os.scandir(self.root):
            if _HASH.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    path = Path(entry.path)
                    found.append((entry.stat().st_mtime, _size_of(path), path))
        found.sort()
        self._sizes = {path.name: size for _, size, path in found}
        return found

    def _sweep(self) -> None:
        """Delete what processes that died left half fetched or half deleted."""
        for entry in os.scandir(self.root):
            is_half = entry.name.startswith((_INCOMING, _TRASH))
            if is_half and time.time() - entry.stat().st_mtime >= STALE_S:
                shutil.rmtree(entry.path, ignore_errors=True)


class _Again(Exception):
    """An attempt failed in a way that may pass; ``is_wrong``: with other bytes."""

    def __init__(self, message: str, *, is_wrong: bool) -> None:
        super().__init__(message)
        self.is_wrong = is_wrong


def _content_of(directory: Path) -> str:
    """Its content hash, or why it has none."""
    try:
        return inspect_adapter(directory).hash
    except AdapterFailed as error:
        return f"of no usable adapter: {error.message}"


def _size_of(directory: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(directory))


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
