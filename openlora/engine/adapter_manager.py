"""Which adapters are on the device: loading, LRU residency, and when a page may be used again.

    registered ──wanted──▶ loading (background thread) ──▶ staged (host) ──acquire──▶ resident
         ▲                        └─ failed: its requests end      ▲                     │
         └─────────────────── evicted, or unregistered ────────────┴─────────────────────┘

Everything but ``load`` itself happens on the engine thread. Pages are pinned while a running
sequence uses them and until the last launched step that names them is done: the pages of a slot
that an old step's metadata still names are never given to another adapter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from openlora.adapters.lora_set import SITES, LoRASet
from openlora.adapters.pages import PagePool, SitePages, join_lora_set
from openlora.engine.adapter_loads import AdapterLoads, Loaded
from openlora.engine.scheduler import Wait
from openlora.engine.sequence import Sequence
from openlora.errors import AdapterFailed, OpenLoRAError, UnknownAdapter

MAX_STAGED = 8
"""Adapters loaded ahead of their pages: enough to hide the reading, few enough for host memory."""


class _State(Enum):
    COLD = auto()
    LOADING = auto()
    STAGED = auto()
    RESIDENT = auto()


@dataclass(slots=True, eq=False)
class _Adapter:
    key: str
    name: str
    path: Path
    state: _State = _State.COLD
    loaded: Loaded | None = None  # in host memory while staged
    content: str = ""  # known after its first load
    page_counts: tuple[int, ...] = ()  # known after its first load
    is_registered: bool = True
    users: set[int] = field(default_factory=set)  # unfinished sequences with it


class AdapterManager:
    """Keeps adapters where their requests need them.

    Args:
        pool: the page pool's book-keeper.
        load: reads and checks an adapter directory; called in background threads; raises
            ``OpenLoRAError``.
        write: copies a loaded adapter into its pages; called on the engine thread.
        num_threads: loads that run at a time.
    """

    def __init__(
        self,
        pool: PagePool,
        load: Callable[[Path], Loaded],
        write: Callable[[SitePages, Loaded], None],
        *,
        num_threads: int = 2,
    ) -> None:
        self.room_epoch = 0
        self._pool = pool
        self._write = write
        self._loads = AdapterLoads(load, num_threads)
        self._by_name: dict[str, _Adapter] = {}
        self._by_key: dict[str, _Adapter] = {}
        self._num_registered = 0
        self._wanted: dict[str, None] = {}  # keys to load, in the order of the requests
        self._staged: dict[str, None] = {}
        self._lru: dict[str, None] = {}  # resident keys, the longest unused first
        self._completed_step = 0
        self._late_unpins: deque[tuple[int, tuple[str, ...]]] = deque()

    def register(self, name: str, path: Path) -> None:
        """Make ``name`` mean the adapter at ``path`` for requests from now on; reads nothing."""
        known = self._by_name.get(name)
        if known is not None:
            if known.path == path:
                return
            self.unregister(name)
        self._num_registered += 1
        adapter = _Adapter(f"{name}#{self._num_registered}", name, path)
        self._by_name[name] = self._by_key[adapter.key] = adapter

    def unregister(self, name: str) -> None:
        """Forget ``name``; requests that were added with it still run with what it meant.

        Raises:
            UnknownAdapter: no adapter of this name.
        """
        adapter = self._by_name.pop(name, None)
        if adapter is None:
            raise _unknown(name, self._by_name)
        adapter.is_registered = False
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
                raise _unknown(name, self._by_name)
            if weight != 0:
                found.append((self._by_name[name], float(weight)))
        for adapter, _ in found:
            adapter.users.add(sequence_id)
            self._want(adapter)
        self._start_loads()
        return tuple((adapter.key, weight) for adapter, weight in found)

    def drop(self, sequence_id: int, adapters: Iterable[tuple[str, float]]) -> None:
        """The sequence has ended and was released; ``adapters`` as ``retain`` gave them."""
        for key, _ in adapters:
            adapter = self._by_key[key]
            adapter.users.discard(sequence_id)
            if not adapter.users:
                self._wanted.pop(key, None)
                if adapter.state is _State.STAGED:
                    self._unstage(adapter, _State.COLD)
            self._discard_if_unused(adapter)
        self._start_loads()

    def poll(self, timeout_s: float = 0) -> list[tuple[str, OpenLoRAError | None]]:
        """Loads that ended since the last call: (key, None or why it failed).

        Call it before each step. Where none has ended, waits for one up to ``timeout_s``.
        """
        results = []
        for key, outcome in self._loads.poll(timeout_s):
            adapter = self._by_key[key]
            error = self._stage(adapter, outcome)
            if error is not None:
                adapter.state = _State.COLD
            results.append((key, error))
        self._start_loads()
        return results

    def oversize(self, sequence: Sequence) -> AdapterFailed | None:
        """Why the sequence's adapters can never be resident together; None where they can."""
        adapters = [self._by_key[key] for key, _ in sequence.adapters]
        if not all(adapter.page_counts for adapter in adapters):
            return None
        return self._check_fit(adapters)

    def acquire(self, sequence: Sequence) -> LoRASet | Wait:
        """Pin the pages of all adapters of the sequence, or of none."""
        adapters = [self._by_key[key] for key, _ in sequence.adapters]
        cold = [a for a in adapters if a.state in (_State.COLD, _State.LOADING)]
        if cold:
            for adapter in cold:
                self._want(adapter)
            self._start_loads()
            return Wait.LOADING
        pinned: list[str] = []
        for adapter in sorted(adapters, key=lambda a: a.state is not _State.RESIDENT):
            if adapter.state is not _State.RESIDENT and not self._make_resident(adapter):
                for key in pinned:
                    self._pool.unpin(key)
                return Wait.NO_ROOM
            self._pool.pin(adapter.key)
            pinned.append(adapter.key)
        for adapter in adapters:
            self._lru.pop(adapter.key)
            self._lru[adapter.key] = None
        self._start_loads()
        return self._join(sequence)

    def release(self, sequence: Sequence) -> None:
        """Unpin what ``acquire`` pinned, as soon as no launched step names it."""
        keys = tuple(key for key, _ in sequence.adapters)
        if keys:
            self._late_unpins.append((sequence.last_step, keys))
            self._unpin_completed()

    def complete(self, step: int) -> None:
        """Step number ``step`` and all before it are done on the device."""
        self._completed_step = step
        self._unpin_completed()

    def is_loading(self, key: str) -> bool:
        """Whether a load of the adapter is under way or queued."""
        return key in self._wanted or self._by_key[key].state is _State.LOADING

    def make_resident(self, key: str) -> bool:
        """Put a staged adapter into pages ahead of any request; False where there is no room."""
        adapter = self._by_key[key]
        return adapter.state is _State.RESIDENT or self._make_resident(adapter)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters in pages, the longest unused first."""
        return tuple(self._by_key[key].name for key in self._lru)

    def users_of(self, key: str) -> Iterable[int]:
        """IDs of the unfinished sequences with this adapter."""
        return tuple(self._by_key[key].users)

    def close(self) -> None:
        """End the loading threads."""
        self._loads.close()

    def check_integrity(self) -> None:
        """Assert that states, pages and lists agree."""
        self._pool.check_integrity()
        resident = {a.key for a in self._by_key.values() if a.state is _State.RESIDENT}
        staged = {a.key for a in self._by_key.values() if a.state is _State.STAGED}
        assert resident == self._lru.keys() == set(self._pool.owners())
        assert staged == self._staged.keys()
        assert all(self._by_key[key].state is _State.COLD for key in self._wanted)
        assert all(a.key in self._by_key for a in self._by_name.values())

    def _want(self, adapter: _Adapter) -> None:
        if adapter.state is _State.COLD:
            self._wanted.setdefault(adapter.key)

    def _start_loads(self) -> None:
        while self._wanted and self._may_load():
            key = next(iter(self._wanted))
            del self._wanted[key]
            adapter = self._by_key[key]
            adapter.state = _State.LOADING
            self._loads.start(key, adapter.path)

    def _may_load(self) -> bool:
        num_loading = self._loads.num_loading
        if num_loading + len(self._staged) < MAX_STAGED:
            return True
        # Parts of ensembles could fill the staging area, each waiting for its other part: where
        # nothing that runs will ever free pages, loading on is the only way forward.
        return not num_loading and not any(self._pool.pins(key) for key in self._lru)

    def _stage(self, adapter: _Adapter, outcome: Loaded | OpenLoRAError) -> OpenLoRAError | None:
        if isinstance(outcome, OpenLoRAError):
            return outcome
        adapter.content, adapter.page_counts = outcome.info.hash, tuple(outcome.page_counts)
        error = self._check_fit([adapter])
        if error is None and adapter.users:
            adapter.state, adapter.loaded = _State.STAGED, outcome
            self._staged[adapter.key] = None
        else:
            adapter.state = _State.COLD
            self._discard_if_unused(adapter)
        return error

    def _check_fit(self, adapters: Collection[_Adapter]) -> AdapterFailed | None:
        counts = tuple(map(sum, zip(*(a.page_counts for a in adapters), strict=True)))
        if not counts or self._pool.fits(counts):
            return None
        needs = ", ".join(
            f"{site}: {count} of {have}"
            for site, count, have in zip(SITES, counts, self._pool.num_pages, strict=True)
        )
        names = " + ".join(repr(a.name) for a in adapters)
        return AdapterFailed(
            f"adapter {names} takes more pages than the pool has ({needs}); "
            "give the engine a larger adapter budget or use a smaller rank"
        )

    def _make_resident(self, adapter: _Adapter) -> bool:
        if not self._evict_for(adapter.page_counts):
            return False
        pages = self._pool.allocate(adapter.key, adapter.page_counts)
        assert pages is not None
        assert adapter.loaded is not None
        self._write(pages, adapter.loaded)
        self._unstage(adapter, _State.RESIDENT)
        self._lru[adapter.key] = None
        return True

    def _evict_for(self, counts: Iterable[int]) -> bool:
        """Evict unpinned adapters until ``counts`` pages are free; none where that cannot do."""
        missing = [count - free for count, free in zip(counts, self._pool.num_free, strict=True)]
        victims: list[_Adapter] = []
        idle = [self._by_key[key] for key in self._lru if not self._pool.pins(key)]
        # An adapter that queued requests wait for goes last, though long unused.
        for adapter in sorted(idle, key=lambda a: bool(a.users)):
            if max(missing) <= 0:
                break
            victims.append(adapter)
            missing = [m - c for m, c in zip(missing, adapter.page_counts, strict=True)]
        if max(missing) > 0:
            return False
        for adapter in victims:
            self._evict(adapter)
        return True

    def _evict(self, adapter: _Adapter) -> None:
        self._pool.free(adapter.key)
        del self._lru[adapter.key]
        adapter.state = _State.COLD

    def _unstage(self, adapter: _Adapter, state: _State) -> None:
        del self._staged[adapter.key]
        adapter.loaded = None
        adapter.state = state

    def _unpin_completed(self) -> None:
        while self._late_unpins and self._late_unpins[0][0] <= self._completed_step:
            _, keys = self._late_unpins.popleft()
            for key in keys:
                self._pool.unpin(key)
                self.room_epoch += 1
                self._discard_if_unused(self._by_key[key])

    def _discard_if_unused(self, adapter: _Adapter) -> None:
        """Forget an adapter that no name and no sequence refers to any more."""
        if adapter.is_registered or adapter.users or adapter.state is _State.LOADING:
            return
        if adapter.state is _State.RESIDENT:
            if self._pool.pins(adapter.key):
                return
            self._evict(adapter)
            self.room_epoch += 1
        self._by_key.pop(adapter.key, None)

    def _join(self, sequence: Sequence) -> LoRASet:
        # Sorted by content, so that equal ensembles are one set however they were written down.
        parts = sorted(
            (self._by_key[key].content, weight, key) for key, weight in sequence.adapters
        )
        return join_lora_set(
            [(self._pool.pages(key), weight) for _, weight, key in parts],
            key="+".join(f"{weight!r}*{content}" for content, weight, _ in parts),
        )


def _unknown(name: str, known: Collection[str]) -> UnknownAdapter:
    return UnknownAdapter(
        f"adapter {name!r} is not registered ({len(known)} are); register it first"
    )
