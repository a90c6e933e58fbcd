"""Adapters by name, from registration to the LoRA set of a request.

    registered ─wanted─▶ fetching (remote) ─▶ loading (thread) ─▶ staged (host) ─acquire─▶ resident
         ▲    │                 │                └─ failed: its requests end  ▲               │
         │    └── wanted, and in the host tier still ─────────────────────────┘               │
         └───────────────────────── evicted, or unregistered ◀────────────────────────────────┘

Everything but ``load`` and ``fetch`` themselves happens on the engine thread. A key stands for one
registration of a name: requests hold keys, so that a name that changes its meaning changes nothing
for them. A pinned adapter has a user that never ends: it is loaded ahead and not evicted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from threading import Event

from openlora.adapters.lora_set import LoRASet
from openlora.adapters.pages import PagePool, SitePages
from openlora.adapters.tier_stats import TierStats
from openlora.engine import adapter_fit
from openlora.engine.adapter_entry import Adapter, State, unknown_adapter
from openlora.engine.adapter_loads import Loaded
from openlora.engine.adapter_pins import AdapterPins
from openlora.engine.adapter_supply import MAX_STAGED, AdapterSupply
from openlora.engine.adapter_turns import Wait
from openlora.engine.lora_sets import LoRASets
from openlora.engine.residency import ResidentAdapters
from openlora.engine.sequence import Sequence
from openlora.errors import OpenLoRAError


class AdapterManager:
    """Keeps adapters where their requests need them.

    Args:
        pool: the page pool's book-keeper.
        write: copies a loaded adapter into its pages; called on the engine thread.
        load, num_threads, cached, max_staged, is_missing, fetch: as ``AdapterSupply`` takes them.
        page_bytes: of one page of each site, for the statistics.
        vocab_size: of the base model.
    """

    def __init__(
        self,
        pool: PagePool,
        load: Callable[[Path], Loaded],
        write: Callable[[SitePages, Loaded], None],
        *,
        num_threads: int = 2,
        cached: Callable[[Path], Loaded | None] | None = None,
        max_staged: int = MAX_STAGED,
        is_missing: Callable[[Path], bool] | None = None,
        fetch: Callable[[Path, Event], None] | None = None,
        page_bytes: tuple[int, ...] = (),
        vocab_size: int = sys.maxsize,
    ) -> None:
        self._resident = ResidentAdapters(pool, write, page_bytes=page_bytes)
        self._supply = AdapterSupply(
            load,
            num_threads=num_threads,
            cached=cached,
            max_staged=max_staged,
            is_missing=is_missing,
            fetch=fetch,
            check=lambda adapter: adapter_fit.check_fit([adapter], self._resident),
            may_overfill=lambda: not self._resident.any_pinned(),
        )
        self._vocab_size, self._max_staged = vocab_size, max_staged
        self._by_name: dict[str, Adapter] = {}
        self._by_key: dict[str, Adapter] = {}
        self._num_registered = 0
        misfits = partial(adapter_fit.any_misfit, self._by_key.values(), self._resident)
        self._pins = AdapterPins(self._resident, self._want, self.make_resident, misfits)
        self._sets = LoRASets(self._resident)

    @property
    def room_epoch(self) -> int:
        """Changes whenever a sequence that was told ``NO_ROOM`` should ask again."""
        return self._resident.room_epoch

    def register(self, name: str, path: Path) -> None:
        """Make ``name`` mean the adapter at ``path`` for requests from now on; reads nothing."""
        known = self._by_name.get(name)
        if known is not None:
            if known.path == path:
                return
            self.unregister(name)
        self._num_registered += 1
        adapter = Adapter(f"{name}#{self._num_registered}", name, path)
        self._by_name[name] = self._by_key[adapter.key] = adapter

    def unregister(self, name: str) -> None:
        """Forget ``name``; requests that were added with it still run with what it meant.

        Raises:
            UnknownAdapter: no adapter of this name.
        """
        adapter = self._by_name.pop(name, None)
        if adapter is None:
            raise unknown_adapter(name, len(self._by_name))
        adapter.is_registered = False
        self._pins.drop(adapter)
        self._discard_if_unused(adapter)

    def retain(
        self, sequence_id: int, adapters: Mapping[str, float]
    ) -> tuple[tuple[str, float], ...]:
        """Resolve a new request's adapters to (key, weight) and start loading what is missing.

        A weight of 0 adds nothing and is left out.

        Raises:
            UnknownAdapter: a name is not registered.
        """
        found = []
        for name, weight in adapters.items():
            if name not in self._by_name:
                raise unknown_adapter(name, len(self._by_name))
            if weight != 0:
                found.append((self._by_name[name], float(weight)))
        for adapter, _ in found:
            adapter.users.add(sequence_id)
            self._want(adapter)
            if self._has_pages(adapter):
                self._resident.counter.hit()
        self._supply.start()
        return tuple((adapter.key, weight) for adapter, weight in found)

    def load_now(self, sequence_id: int, name: str) -> str:
        """As ``retain`` for one adapter, ahead of all others; returns its key."""
        adapter = self._by_name[name]
        adapter.users.add(sequence_id)
        if not self._has_pages(adapter):
            self._supply.want_now(adapter)
            self._supply.start()
        return adapter.key

    def drop(self, sequence_id: int, adapters: Iterable[tuple[str, float]]) -> None:
        """The sequence has ended and was released; ``adapters`` as ``retain`` gave them."""
        for key, _ in adapters:
            adapter = self._by_key[key]
            adapter.users.discard(sequence_id)
            self._discard_if_unused(adapter)
        self._supply.start()

    def set_pins(self, names: Collection[str]) -> None:
        """Pin these and no others: each is loaded, put into pages and kept there.

        Names that are not registered are left out. Those that failed are tried again.
        """
        gone = self._pins.set(self._by_name[name] for name in names if name in self._by_name)
        self._discard_unused(adapter.key for adapter in gone)
        self._place_pins()

    def poll(self, timeout_s: float = 0) -> list[tuple[str, OpenLoRAError | None]]:
        """Loads that ended since the last call: (key, None or why it failed).

        Call it before each step. Where none has ended, waits for one up to ``timeout_s``.
        """
        results = []
        for adapter, error in self._supply.poll(timeout_s):
            self._discard_if_unused(adapter)
            results.append((adapter.key, error))
        self._place_pins()
        return results

    def misfit(self, sequence: Sequence) -> OpenLoRAError | None:
        """Why the sequence can never run with its adapters; None where it can, or where that is
        not known yet: not all of them were loaded before."""
        adapters = [(self._by_key[key], weight) for key, weight in sequence.adapters]
        if not all(adapter.page_counts for adapter, _ in adapters):
            return None
        return adapter_fit.misfit(sequence, adapters, self._resident, self._vocab_size)

    def acquire(self, sequence: Sequence) -> LoRASet | Wait:
        """Pin the pages of all adapters of the sequence, or of none."""
        adapters = [self._by_key[key] for key, _ in sequence.adapters]
        missing = [a for a in adapters if a.state is not State.STAGED and not self._has_pages(a)]
        if missing:
            for adapter in missing:
                self._want(adapter)
            self._supply.start()
            if any(adapter.state is not State.STAGED for adapter in missing):
                return Wait.LOADING
        pinned: list[str] = []
        # Those that are resident first: pinned, they are not evicted for the others.
        for adapter in sorted(adapters, key=self._has_pages, reverse=True):
            if not self.make_resident(adapter.key):
                for key in pinned:
                    self._resident.unpin(key)
                return Wait.NO_ROOM
            self._resident.pin(adapter.key)
            pinned.append(adapter.key)
        self._supply.start()
        return self._sets.join((self._by_key[key], weight) for key, weight in sequence.adapters)

    def fit_together(self, keys: Collection[str]) -> bool | None:
        """As ``Residency`` says."""
        return adapter_fit.fits([self._by_key[key] for key in keys], self._resident)

    def turn_s(self, keys: Collection[str]) -> float | None:
        """As ``Residency`` says."""
        adapters = [self._by_key[key] for key in keys]
        return adapter_fit.turn_s(adapters, self._resident, self._max_staged)

    def release(self, sequence: Sequence) -> None:
        """Unpin what ``acquire`` pinned, as soon as no launched step names it."""
        keys = tuple(key for key, _ in sequence.adapters)
        if keys:
            self._discard_unused(self._resident.unpin_after(sequence.last_step, keys))

    def complete(self, step: int) -> None:
        """Step number ``step`` and all before it are done on the device."""
        self._discard_unused(self._resident.complete(step))

    def is_loading(self, key: str) -> bool:
        """Whether a load of the adapter is under way or queued."""
        return self._supply.is_loading(self._by_key[key])

    def has_pins_under_way(self) -> bool:
        """Whether pinned adapters are still on their way into pages."""
        return any(self.is_loading(key) for key in self._pins.keys)

    def make_resident(self, key: str) -> bool:
        """Put a staged adapter into pages, if it is not there; False where there is no room."""
        adapter = self._by_key[key]
        if self._has_pages(adapter):
            return True
        assert adapter.loaded is not None
        if not self._resident.place(key, adapter.loaded, lambda k: bool(self._by_key[k].users)):
            return False
        self._supply.unstage(adapter)
        return True

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters in pages, the longest unused first."""
        return tuple(self._by_key[key].name for key in self._resident.keys)

    def device_stats(self) -> TierStats:
        """Of the tier of pages."""
        return self._resident.stats(self.resident)

    def names(self) -> dict[Path, str]:
        """Registered adapters by their paths."""
        return {adapter.path: name for name, adapter in self._by_name.items()}

    def users_of(self, key: str) -> Iterable[int]:
        """IDs of the unfinished sequences with this adapter; none of one that was forgotten."""
        adapter = self._by_key.get(key)
        return () if adapter is None else tuple(adapter.users)

    def close(self) -> None:
        """End the loading threads."""
        self._supply.close()

    def check_integrity(self) -> None:
        """Assert that states, pages and lists agree."""
        self._resident.check_integrity()
        self._supply.check_integrity()
        staged = {a.key for a in self._by_key.values() if a.state is State.STAGED}
        assert staged == {adapter.key for adapter in self._supply.staged}
        assert not any(key in staged for key in self._resident.keys)
        assert all(key in self._by_key for key in self._resident.keys)
        assert all(a.key in self._by_key for a in self._by_name.values())
        assert {a.key for a in self._by_key.values() if a.is_pinned} == set(self._pins.keys)

    def _place_pins(self) -> None:
        self._discard_unused(adapter.key for adapter in self._pins.place())
        self._supply.start()

    def _has_pages(self, adapter: Adapter) -> bool:
        return adapter.key in self._resident

    def _want(self, adapter: Adapter) -> None:
        if not self._has_pages(adapter):
            self._supply.want(adapter)

    def _discard_unused(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self._by_key:
                self._discard_if_unused(self._by_key[key])

    def _discard_if_unused(self, adapter: Adapter) -> None:
        """Stop loading an adapter that nobody wants, and forget one that has no name any more."""
        if adapter.users:
            return
        self._supply.abandon(adapter)
        if adapter.is_registered or adapter.state in (State.FETCHING, State.LOADING):
            return
        if self._has_pages(adapter):
            if self._resident.is_pinned(adapter.key):
                return
            self._resident.evict(adapter.key)
        self._by_key.pop(adapter.key, None)
