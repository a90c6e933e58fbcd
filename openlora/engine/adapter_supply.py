"""What brings adapters into host memory: fetched from the store, loaded, staged for their pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

from openlora.engine.adapter_entry import Adapter, State
from openlora.engine.adapter_loads import AdapterLoads, Fetch, Loaded, Outcome
from openlora.errors import OpenLoRAError

MAX_STAGED = 8
"""Adapters loaded ahead of their pages where there is no host tier: enough to hide the reading."""

logger = logging.getLogger(__name__)


class AdapterSupply:
    """Loads what is wanted, in the order of the requests. Engine thread only.

    Args:
        load: reads and checks an adapter directory; called in background threads; raises
            ``OpenLoRAError``.
        num_threads: loads that run at a time.
        cached: what ``load`` would return, where that takes no reading.
        max_staged: adapters loaded ahead of their pages, as many as host memory has room for.
        is_missing: whether a path must be fetched before it can be loaded; None: none must.
        fetch: does that, in a background thread.
        check: why an adapter that was loaded can never be used; None where it can.
        may_overfill: whether nothing that runs will ever make room for what is staged.
    """

    def __init__(
        self,
        load: Callable[[Path], Loaded],
        *,
        num_threads: int,
        cached: Callable[[Path], Loaded | None] | None,
        max_staged: int,
        is_missing: Callable[[Path], bool] | None,
        fetch: Callable[[Path, Event], None] | None,
        check: Callable[[Adapter], OpenLoRAError | None],
        may_overfill: Callable[[], bool],
    ) -> None:
        self._loads = AdapterLoads(load, num_threads, fetch)
        self._cached = cached
        self._max_staged = max_staged
        self._is_missing = is_missing
        self._check = check
        self._may_overfill = may_overfill
        # Of adapters that needed no load; told by the next ``poll``.
        self._instant: list[tuple[Adapter, OpenLoRAError | None]] = []
        # By key, in the order of the requests.
        self._to_fetch: dict[str, Adapter] = {}
        self._wanted: dict[str, Adapter] = {}
        self._busy: dict[str, Adapter] = {}  # fetching or loading
        self._staged: dict[str, Adapter] = {}

    @property
    def staged(self) -> tuple[Adapter, ...]:
        """Those that wait for their pages."""
        return tuple(self._staged.values())

    def want(self, adapter: Adapter) -> None:
        """Load an adapter that is not in pages, in its turn; see ``start``."""
        key = adapter.key
        if adapter.state is State.COLD and key not in self._wanted and key not in self._to_fetch:
            is_remote = self._is_missing is not None and self._is_missing(adapter.path)
            (self._to_fetch if is_remote else self._wanted)[key] = adapter

    def want_now(self, adapter: Adapter) -> None:
        """As ``want``, ahead of all others that need no fetch."""
        self.want(adapter)
        if self._wanted.pop(adapter.key, None) is not None:
            self._load(adapter)

    def start(self) -> None:
        """Begin what there is room for."""
        while self._to_fetch and self._loads.may_fetch:
            adapter = _pop_first(self._to_fetch)
            adapter.state = State.FETCHING
            self._busy[adapter.key] = adapter
            self._loads.start_fetch(adapter.key, adapter.path)
        while self._wanted and self._may_load():
            self._load(_pop_first(self._wanted))

    def poll(self, timeout_s: float = 0) -> list[tuple[Adapter, OpenLoRAError | None]]:
        """Loads that ended since the last call, and why they failed; fetches that were given up.

        Where none has ended, waits for one up to ``timeout_s``.
        """
        results, self._instant = self._instant, []
        deadline = time.monotonic() + timeout_s
        # Once more after a fetch: the load behind it is what the caller waits for.
        while True:
            left_s = max(0.0, deadline - time.monotonic()) if timeout_s and not results else 0
            ended = self._loads.poll(left_s)
            for key, outcome in ended:
                adapter = self._busy.pop(key)
                adapter.state = State.COLD
                if not isinstance(outcome, Fetch):
                    results.append((adapter, self._stage(adapter, outcome)))
                elif adapter.users:
                    # Where a fetch was given up and somebody came meanwhile, it begins anew.
                    self.want(adapter)
                else:
                    results.append((adapter, None))
            self.start()
            results += self._instant
            self._instant.clear()
            if results or not ended:
                return results

    def abandon(self, adapter: Adapter) -> None:
        """Nobody wants the adapter any more: what is being done for it ends where it can."""
        self._wanted.pop(adapter.key, None)
        self._to_fetch.pop(adapter.key, None)
        if adapter.state is State.FETCHING:
            self._loads.cancel_fetch(adapter.key)
        elif adapter.state is State.STAGED:
            self.unstage(adapter)

    def unstage(self, adapter: Adapter) -> None:
        """Let go of an adapter's copy in host memory: it is in pages, or nobody wants it."""
        del self._staged[adapter.key]
        adapter.loaded, adapter.state = None, State.COLD

    def is_loading(self, adapter: Adapter) -> bool:
        """Whether a load of the adapter is under way or queued."""
        is_queued = adapter.key in self._wanted or adapter.key in self._to_fetch
        return is_queued or adapter.state in (State.FETCHING, State.LOADING)

    def close(self) -> None:
        """End the loading threads."""
        self._loads.close()

    def check_integrity(self) -> None:
        """Assert that states and lists agree."""
        assert all(adapter.state is State.STAGED for adapter in self._staged.values())
        waiting = [*self._wanted.values(), *self._to_fetch.values()]
        assert all(adapter.state is State.COLD for adapter in waiting)
        assert not self._wanted.keys() & self._to_fetch.keys()

    def _load(self, adapter: Adapter) -> None:
        found = self._cached(adapter.path) if self._cached is not None else None
        if found is None:
            adapter.state = State.LOADING
            self._busy[adapter.key] = adapter
            self._loads.start(adapter.key, adapter.path)
        else:
            self._instant.append((adapter, self._stage(adapter, found)))

    def _may_load(self) -> bool:
        num_loading = self._loads.num_loading
        if num_loading + len(self._staged) < self._max_staged:
            return True
        # Parts of ensembles could fill the staging area, each waiting for its other part: where
        # nothing that runs will ever free pages, loading on is the only way forward.
        return not num_loading and self._may_overfill()

    def _stage(self, adapter: Adapter, outcome: Outcome) -> OpenLoRAError | None:
        assert not isinstance(outcome, Fetch)
        if isinstance(outcome, OpenLoRAError):
            error: OpenLoRAError | None = outcome
        else:
            adapter.learn(outcome)
            error = self._check(adapter)
        if error is not None:
            if adapter.is_pinned:
                logger.warning("pinned adapter %s is not loaded: %s", adapter.name, error)
        elif adapter.users:
            assert not isinstance(outcome, OpenLoRAError)
            adapter.state, adapter.loaded = State.STAGED, outcome
            self._staged[adapter.key] = adapter
        return error


def _pop_first(adapters: dict[str, Adapter]) -> Adapter:
    return adapters.pop(next(iter(adapters)))
