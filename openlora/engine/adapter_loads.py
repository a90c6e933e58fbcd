"""Loads that run in background threads, and the hand-over of their results to the engine thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from openlora.errors import AdapterFailed, InternalError, OpenLoRAError

logger = logging.getLogger(__name__)


class AdapterInfo(Protocol):
    """What is read of an adapter's description."""

    @property
    def hash(self) -> str:
        """SHA-256 of its content."""


class Loaded(Protocol):
    """An adapter in host memory, as ``openlora.adapters.loader.load_adapter`` returns it."""

    @property
    def info(self) -> AdapterInfo:
        """Its description."""

    @property
    def page_counts(self) -> tuple[int, ...]:
        """Pages it takes of each site."""


class AdapterLoads:
    """Runs ``load`` in threads. All methods belong to one thread, the engine's.

    Args:
        load: reads and checks an adapter directory; raises ``OpenLoRAError``.
        num_threads: loads that run at a time.
    """

    def __init__(self, load: Callable[[Path], Loaded], num_threads: int) -> None:
        self.num_loading = 0
        self._load = load
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="adapter-load")
        self._ended: SimpleQueue[tuple[str, Path, Future[Loaded]]] = SimpleQueue()

    def start(self, key: str, path: Path) -> None:
        """Load ``path``; the result comes under ``key``."""
        self.num_loading += 1
        future = self._threads.submit(self._load, path)
        future.add_done_callback(lambda done: self._ended.put((key, path, done)))

    def poll(self, timeout_s: float = 0) -> list[tuple[str, Loaded | OpenLoRAError]]:
        """Results since the last call; where there are none, wait for one up to ``timeout_s``."""
        results: list[tuple[str, Loaded | OpenLoRAError]] = []
        try:
            while self.num_loading:
                wait = timeout_s > 0 and not results
                key, path, future = self._ended.get(block=wait, timeout=timeout_s if wait else None)
                self.num_loading -= 1
                results.append((key, _outcome(path, future)))
        except Empty:
            pass
        return results

    def close(self) -> None:
        """Wait for the loads that run, drop the others, end the threads."""
        self._threads.shutdown(cancel_futures=True)


def _outcome(path: Path, future: Future[Loaded]) -> Loaded | OpenLoRAError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, OpenLoRAError):
        return error
    if isinstance(error, OSError):
        return AdapterFailed(f"cannot read the adapter at {path}: {error}; check the files")
    logger.error("loading %s failed; its requests end with an error", path, exc_info=error)
    return InternalError(f"loading the adapter at {path} failed: {error!r}; see the engine's log")
