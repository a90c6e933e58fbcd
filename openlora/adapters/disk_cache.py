"""Adapters of a remote store on local disk: the disk tier. Thread-safe, shared by processes.

    root/<hash>/         the files of the adapter with that content hash, checked against it
    root/.locks/<hash>   held shared by whoever reads it, alone by whoever fetches or evicts it
    root/.incoming-…, .trash-…     what is being fetched, or deleted
    root/.quarantine/<hash>        what the store gave for an adapter and was another content

An adapter appears in one rename, after its SHA-256 was found to be its name. The longest unused go
when the budget is exceeded, never one that somebody reads.

Behind each system call a fetch waits for the interpreter's lock, which the engine's thread has, and
takes it from that. So what is here is remembered (disk_index.py), not looked for at each fetch.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event

from openlora.adapters.adapter_source import Cancelled, Evicted, Source
from openlora.adapters.content_locks import ContentLocks
from openlora.adapters.disk_eviction import DiskEviction
from openlora.adapters.disk_index import DiskIndex, is_content_hash, size_of
from openlora.adapters.peft_format import inspect_adapter
from openlora.adapters.quarantine import QUARANTINE, keep_aside
from openlora.adapters.tier_stats import TierCounter, TierStats
from openlora.errors import AdapterFailed

BACK_OFF_S = (0.25, 0.5, 1.0, 2.0)
"""Waits between the attempts at a store that does not answer, or answers wrongly."""
REFUSED_S = 30.0
"""What the store has in other bytes than its name says is not asked for again so soon."""
_INCOMING, _LOCKS = ".incoming-", ".locks"

logger = logging.getLogger(__name__)


class DiskCache:
    """The adapters below ``root``.

    Where one process uses it, no more than ``max_bytes`` is here when ``ensure`` returns, but for
    adapters that are being read or placed, or wait for their first reading. What other processes
    bring counts from this one's first fetch on that is ``RESCAN_S`` or ``RESCAN_BROUGHT`` fetches
    later: by what they bring meanwhile the budget may be exceeded. What is on its way here, or
    being deleted, comes on top.

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
        self._index = DiskIndex(self.root)
        self._eviction = DiskEviction(
            self.root, self._index, self._locks, self._counter, self._max_bytes
        )
        with contextlib.suppress(OSError):
            self._index.rescan()
            self._eviction.sweep(_INCOMING)

    def path(self, content_hash: str) -> Path:
        """Where it is, or will be."""
        return self.root / content_hash

    def owns(self, path: Path) -> bool:
        """Whether ``path`` is an adapter's place in this cache."""
        return path.parent == self.root and is_content_hash(path.name)

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
            with self._locks.alone(path.name):
                is_here = path.is_dir()
                try:
                    if not is_here:
                        self._bring(path, cancelled or Event())
                        is_here = True
                    self._keep(path, keep_s)
                finally:
                    if not is_here:
                        self._locks.remove(path.name)
            self.trim()
            self._counter.loaded(time.perf_counter() - started)
        except AdapterFailed:
            self._counter.failed()
            raise
        except OSError as error:
            self._counter.failed()
            raise AdapterFailed(
                f"the adapter cache {self.root} cannot be written: {error}; free space there, or "
                "name another folder with OPENLORA_ADAPTER_CACHE"
            ) from error

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Keep the adapter of ``path`` in place.

        Raises:
            Evicted: it is not there any more.
        """
        with self._locks.shared(path.name):
            used_ns = time.time_ns()
            if not _set_used(path, used_ns):
                self._locks.remove(path.name)
                raise Evicted(f"adapter {path.name} went before it was read")
            if not self._index.used(path.name, used_ns):  # else this is what it was fetched for
                self._counter.hit()
            yield

    def drop_damaged(self, paths: Iterable[Path]) -> bool:
        """Delete those that hold other content than was fetched; whether there were any."""
        dropped = False
        for path in paths:
            if path.is_dir() and _content_of(path) != path.name:
                logger.warning("the copy of adapter %s is damaged; fetched anew", path)
                dropped |= self._eviction.evict(path)
        return dropped

    def trim(self) -> None:
        """Delete the longest unused until what is here, or about to be placed, fits the budget."""
        self._eviction.trim()

    def stats(self) -> TierStats:
        """As of this process; what others brought is seen at a load, ``RESCAN_S`` later at most."""
        here = self._index.snapshot()
        return self._counter.stats(
            "disk",
            adapters=len(here),
            bytes_used=sum(size for _, size in here),
            bytes_limit=self._max_bytes,
            names=tuple(name for name, _ in here),
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
        # Only whoever has the lock of this content makes such a directory.
        copy = self.root / f"{_INCOMING}{path.name}-{time.time_ns()}"
        copy.mkdir()
        try:
            self._fetch(path.name, copy, cancelled)
            self._check(path, copy)
            self._place(path, copy)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise

    def _fetch(self, content_hash: str, copy: Path, cancelled: Event) -> None:
        try:
            self._source.fetch(content_hash, copy, cancelled)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                if self._eviction.make_room():
                    raise _Again(f"the disk of {self.root} was full", is_wrong=False) from error
                raise
            raise _Again(
                f"the adapter store {self._source.name} does not give adapter {content_hash}: "
                f"{_words(error)}; try again, and see whether it can be reached from here",
                is_wrong=False,
            ) from error

    def _place(self, path: Path, copy: Path) -> None:
        size = size_of(copy)
        if size > self._max_bytes:
            raise AdapterFailed(
                f"adapter {path.name} has {size} bytes; the adapter cache may hold "
                f"{self._max_bytes} (OPENLORA_ADAPTER_CACHE_BYTES): raise that"
            )
        self._index.expect(path.name, size)
        try:
            self.trim()
            used_ns = time.time_ns()
            os.utime(copy, ns=(used_ns, used_ns))  # what came slowly is not the longest unused
            copy.rename(path)
        except BaseException:
            self._index.forget(path.name)
            raise
        self._index.placed(path.name, size, used_ns)

    def _keep(self, path: Path, keep_s: float) -> None:
        """It is here, and its lock is held: whoever waited for that is to read it."""
        until = time.monotonic() + keep_s
        if not self._index.keep(path.name, until):  # another process brought it
            self._index.placed(path.name, size_of(path), path.stat().st_mtime_ns, until)

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


def _set_used(path: Path, used_ns: int) -> bool:
    """Whether it is there, which it takes no other system call to learn."""
    try:
        os.utime(path, ns=(used_ns, used_ns))
    except FileNotFoundError:
        return False
    except OSError:
        with contextlib.suppress(OSError):
            os.utime(path)  # all that who does not own it may set
        return path.is_dir()
    return True


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
