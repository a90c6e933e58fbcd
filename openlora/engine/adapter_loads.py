"""Loads that run in background threads, and the hand-over of their results to the engine thread.

What lies in a remote store is fetched first, in threads of their own: a store that is slow or away
holds up no load of what is here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import Enum, auto
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Barrier, Event, Thread
from typing import Any, Protocol

import torch

from openlora.adapters.adapter_source import Cancelled, Evicted
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


class Fetch(Enum):
    """How a fetch ended that did not fail."""

    DONE = auto()
    CANCELLED = auto()


Outcome = Loaded | Fetch | OpenLoRAError
MAX_FETCHES = 8
"""Fetches at a time: they wait for the network most of the time."""


class AdapterLoads:
    """Runs loads and fetches in threads. All methods belong to one thread, the engine's.

    Args:
        load: reads and checks an adapter directory; raises ``OpenLoRAError``.
        num_threads: loads that run at a time.
        fetch: has a directory brought to this machine; raises ``OpenLoRAError`` or ``Cancelled``.
    """

    def __init__(
        self,
        load: Callable[[Path], Loaded],
        num_threads: int,
        fetch: Callable[[Path, Event], None] | None = None,
    ) -> None:
        self.num_loading = 0
        self._load = load
        self._fetch = fetch
        self._cancels: dict[str, Event] = {}
        self._threads = _single_threaded_pool(num_threads)
        # Key, path, whether it was a fetch, and its end.
        self._ended: SimpleQueue[tuple[str, Path, bool, Future[Any]]] = SimpleQueue()

    @property
    def may_fetch(self) -> bool:
        """Whether one more fetch may begin now."""
        return len(self._cancels) < MAX_FETCHES

    def start(self, key: str, path: Path) -> None:
        """Load ``path``; the result comes under ``key``."""
        self.num_loading += 1
        future = self._threads.submit(self._load, path)
        future.add_done_callback(lambda done: self._ended.put((key, path, False, done)))

    def start_fetch(self, key: str, path: Path) -> None:
        """Fetch ``path``; that it is here comes under ``key``."""
        cancelled = self._cancels[key] = Event()
        # A daemon: a store that never answers must not keep the process from ending.
        Thread(
            target=self._run_fetch, args=(key, path, cancelled), name="adapter-fetch", daemon=True
        ).start()

    def cancel_fetch(self, key: str) -> None:
        """Nobody wants the adapter any more; what runs ends at its next piece."""
        if key in self._cancels:
            self._cancels[key].set()

    def poll(self, timeout_s: float = 0) -> list[tuple[str, Outcome]]:
        """Results since the last call; where there are none, wait for one up to ``timeout_s``."""
        results: list[tuple[str, Outcome]] = []
        try:
            while self.num_loading or self._cancels:
                blocks = timeout_s > 0 and not results
                key, path, is_fetch, future = self._ended.get(
                    block=blocks, timeout=timeout_s if blocks else None
                )
                if is_fetch:
                    del self._cancels[key]
                else:
                    self.num_loading -= 1
                results.append((key, _outcome(path, future)))
        except Empty:
            pass
        return results

    def close(self) -> None:
        """Wait for the loads that run, drop the others and the fetches, end the threads."""
        for cancelled in self._cancels.values():
            cancelled.set()
        self._threads.shutdown(cancel_futures=True)

    def _run_fetch(self, key: str, path: Path, cancelled: Event) -> None:
        assert self._fetch is not None
        future: Future[Fetch] = Future()
        try:
            self._fetch(path, cancelled)
        except Cancelled:
            future.set_result(Fetch.CANCELLED)
        except BaseException as error:  # noqa: BLE001 - handed over, as a pool's thread does
            future.set_exception(error)
        else:
            future.set_result(Fetch.DONE)
        self._ended.put((key, path, True, future))


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


def _outcome(path: Path, future: Future[Any]) -> Outcome:
    error = future.exception()
    if error is None:
        outcome: Loaded | Fetch = future.result()
        return outcome
    if isinstance(error, Evicted):
        return Fetch.CANCELLED
    if isinstance(error, OpenLoRAError):
        return error
    if isinstance(error, OSError):
        return AdapterFailed(f"cannot read the adapter at {path}: {error}; check the files")
    logger.error("loading %s failed; its requests end with an error", path, exc_info=error)
    return InternalError(f"loading the adapter at {path} failed: {error!r}; see the engine's log")
