"""Loads that run in background threads, and the hand-over of their results to the engine thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Barrier
from typing import Protocol

import torch

from openlora.adapters.extras import AdapterExtras
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

    @property
    def extras(self) -> AdapterExtras | None:
        """What it has beside pages."""


class AdapterLoads:
    """Runs ``load`` in threads. All methods belong to one thread, the engine's.

    Args:
        load: reads and checks an adapter directory; raises ``OpenLoRAError``.
        num_threads: loads that run at a time.
    """

    def __init__(self, load: Callable[[Path], Loaded], num_threads: int) -> None:
        self.num_loading = 0
        self._load = load
        self._threads = _single_threaded_pool(num_threads)
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
                blocks = timeout_s > 0 and not results
                key, path, future = self._ended.get(
                    block=blocks, timeout=timeout_s if blocks else None
                )
                self.num_loading -= 1
                results.append((key, _outcome(path, future)))
        except Empty:
            pass
        return results

    def close(self) -> None:
        """Wait for the loads that run, drop the others, end the threads."""
        self._threads.shutdown(cancel_futures=True)


def _single_threaded_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads whose torch operations start no OpenMP team of their own.

    With more teams than cores, OpenMP's threads no longer spin between two operations but sleep:
    on CPU every operation of the engine's steps would then wait for a wake-up, a quarter more
    time per step for as long as these threads live.
    """
    engine_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, "adapter-load", _use_one_thread)
    started = Barrier(num_threads)
    wait([pool.submit(started.wait) for _ in range(num_threads)])
    # The number is each thread's own, but it is also what threads start with from then on.
    torch.set_num_threads(engine_threads)
    return pool


def _use_one_thread() -> None:
    # Asking first makes torch take its own start value now, not over this one at the first load.
    torch.get_num_threads()
    torch.set_num_threads(1)


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
