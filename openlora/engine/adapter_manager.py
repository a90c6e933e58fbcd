"""Adapters by name, from registration to the LoRA set of a request.

    registered ──wanted──▶ loading (background thread) ──▶ staged (host) ──acquire──▶ resident
         ▲    │                   └─ failed: its requests end   ▲  ▲                     │
         │    └───── wanted, and in the host tier still ────────┘  │                     │
         └─────────────────── evicted, or unregistered ────────────┴─────────────────────┘

Everything but ``load`` itself happens on the engine thread. A key stands for one registration of
a name: requests hold keys, so that a name that changes its meaning changes nothing for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from openlora.adapters.lora_set import SITES, LoRASet
from openlora.adapters.pages import PagePool, SitePages, join_lora_set
from openlora.engine.adapter_loads import AdapterLoads, Loaded
from openlora.engine.residency import ResidentAdapters
from openlora.engine.scheduler import Wait
from openlora.engine.sequence import Sequence
from openlora.errors import AdapterFailed, OpenLoRAError, UnknownAdapter

MAX_STAGED = 8
"""Adapters loaded ahead of their pages where there is no host tier: enough to hide the reading."""


class _State(Enum):
    COLD = auto()
    LOADING = auto()
    STAGED = auto()


@dataclass(slots=True, eq=False)
class _Adapter:
    key: str
    name: str
    path: Path
    state: _State = _State.COLD  # of its host copy; in pages or not is residency's
    loaded: Loaded | None = None  # in host memory while staged
    content: str = ""  # known after its first load
    page_counts: tuple[int, ...] = ()  # known after its first load
    extras_bytes: int = 0  # known after its first load; 0: it has no extras
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
        cached: what ``load`` would return, where that takes no reading; called on the engine
            thread.
        max_staged: adapters loaded ahead of their pages, as many as host memory has room for.
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
    ) -> None:
        self._resident = ResidentAdapters(pool, write)
        self._loads = AdapterLoads(load, num_threads)
        self._cached = cached
        self._max_staged = max_staged
        # Of adapters that needed no load; told by the next ``poll``.
        self._instant: list[tuple[str, OpenLoRAError | None]] = []
        self._by_name: dict[str, _Adapter] = {}
        self._by_key: dict[str, _Adapter] = {}
        self._num_registered = 0
        self._wanted: dict[str, None] = {}  # keys to load, in the order of the requests
        self._staged: dict[str, None] = {}

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

    def load_now(self, sequence_id: int, name: str) -> str:
        """As ``retain`` for one adapter, ahead of all others; returns its key."""
        adapter = self._by_name[name]
        adapter.users.add(sequence_id)
        if adapter.state is _State.COLD and not self._has_pages(adapter):
            self._wanted.pop(adapter.key, None)
            self._load(adapter)
        return adapter.key

    def drop(self, sequence_id: int, adapters: Iterable[tuple[str, float]]) -> None:
        """The sequence has ended and was released; ``adapters`` as ``retain`` gave them."""
        for key, _ in adapters:
            adapter = self._by_key[key]
            adapter.users.discard(sequence_id)
            if not adapter.users:
                self._wanted.pop(key, None)
                if adapter.state is _State.STAGED:
                    self._unstage(adapter)
            self._discard_if_unused(adapter)
        self._start_loads()

    def poll(self, timeout_s: float = 0) -> list[tuple[str, OpenLoRAError | None]]:
        """Loads that ended since the last call: (key, None or why it failed).

        Call it before each step. Where none has ended, waits for one up to ``timeout_s``.
        """
        results, self._instant = self._instant, []
        for key, outcome in self._loads.poll(0 if results else timeout_s):
            adapter = self._by_key[key]
            error = self._stage(adapter, outcome)
            if error is not None:
                adapter.state = _State.COLD
            self._discard_if_unused(adapter)
            results.append((key, error))
        self._start_loads()
        return results

    def oversize(self, sequence: Sequence) -> AdapterFailed | None:
        """Why the sequence's adapters can never be resident together; None where they can."""
        adapters = [self._by_key[key] for key, _ in sequence.adapters]
        if not all(adapter.page_counts for adapter in adapters):
            return None
        return self._check_fit(adapters) or self._check_exact(sequence)

    def acquire(self, sequence: Sequence) -> LoRASet | Wait:
        """Pin the pages of all adapters of the sequence, or of none."""
        adapters = [self._by_key[key] for key, _ in sequence.adapters]
        missing = [a for a in adapters if a.state is not _State.STAGED and not self._has_pages(a)]
        if missing:
            for adapter in missing:
                self._want(adapter)
            self._start_loads()
            if any(adapter.state is not _State.STAGED for adapter in missing):
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
        self._start_loads()
        return self._join(sequence)

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
        return key in self._wanted or self._by_key[key].state is _State.LOADING

    def make_resident(self, key: str) -> bool:
        """Put a staged adapter into pages, if it is not there; False where there is no room."""
        adapter = self._by_key[key]
        if self._has_pages(adapter):
            return True
        assert adapter.loaded is not None
        if not self._resident.place(key, adapter.loaded, lambda k: bool(self._by_key[k].users)):
            return False
        self._unstage(adapter)
        return True

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters in pages, the longest unused first."""
        return tuple(self._by_key[key].name for key in self._resident.keys)

    def users_of(self, key: str) -> Iterable[int]:
        """IDs of the unfinished sequences with this adapter; none of one that was forgotten."""
        adapter = self._by_key.get(key)
        return () if adapter is None else tuple(adapter.users)

    def close(self) -> None:
        """End the loading threads."""
        self._loads.close()

    def check_integrity(self) -> None:
        """Assert that states, pages and lists agree."""
        self._resident.check_integrity()
        staged = {a.key for a in self._by_key.values() if a.state is _State.STAGED}
        assert staged == self._staged.keys()
        assert not any(key in staged for key in self._resident.keys)
        assert all(key in self._by_key for key in self._resident.keys)
        assert all(self._by_key[key].state is _State.COLD for key in self._wanted)
        assert all(a.key in self._by_key for a in self._by_name.values())

    def _has_pages(self, adapter: _Adapter) -> bool:
        return adapter.key in self._resident

    def _want(self, adapter: _Adapter) -> None:
        if adapter.state is _State.COLD and not self._has_pages(adapter):
            self._wanted.setdefault(adapter.key)

    def _start_loads(self) -> None:
        while self._wanted and self._may_load():
            key = next(iter(self._wanted))
            del self._wanted[key]
            self._load(self._by_key[key])

    def _load(self, adapter: _Adapter) -> None:
        found = self._cached(adapter.path) if self._cached is not None else None
        if found is None:
            adapter.state = _State.LOADING
            self._loads.start(adapter.key, adapter.path)
        else:
            self._instant.append((adapter.key, self._stage(adapter, found)))

    def _may_load(self) -> bool:
        num_loading = self._loads.num_loading
        if num_loading + len(self._staged) < self._max_staged:
            return True
        # Parts of ensembles could fill the staging area, each waiting for its other part: where
        # nothing that runs will ever free pages, loading on is the only way forward.
        return not num_loading and not self._resident.any_pinned()

    def _stage(self, adapter: _Adapter, outcome: Loaded | OpenLoRAError) -> OpenLoRAError | None:
        if isinstance(outcome, OpenLoRAError):
            return outcome
        adapter.content, adapter.page_counts = outcome.info.hash, tuple(outcome.page_counts)
        adapter.extras_bytes = 0 if outcome.extras is None else outcome.extras.size_bytes
        error = self._check_fit([adapter])
        if error is None and adapter.users:
            adapter.state, adapter.loaded = _State.STAGED, outcome
            self._staged[adapter.key] = None
        else:
            adapter.state = _State.COLD
        return error

    def _check_fit(self, adapters: Collection[_Adapter]) -> AdapterFailed | None:
        extras_bytes = sum(adapter.extras_bytes for adapter in adapters)
        if extras_bytes > self._resident.extras_bytes:
            return AdapterFailed(
                f"weights of adapter {' + '.join(repr(a.name) for a in adapters)} that are no "
                f"low-rank pairs take {extras_bytes} bytes; at most "
                f"{self._resident.extras_bytes} are kept"
            )
        counts = tuple(map(sum, zip(*(a.page_counts for a in adapters), strict=True)))
        if not counts or self._resident.fits(counts):
            return None
        needs = ", ".join(
            f"{site}: {count} of {have}"
            for site, count, have in zip(SITES, counts, self._resident.num_pages, strict=True)
        )
        names = " + ".join(repr(a.name) for a in adapters)
        return AdapterFailed(
            f"adapter {names} takes more pages than the pool has ({needs}); "
            "give the engine a larger adapter budget or use a smaller rank"
        )

    def _check_exact(self, sequence: Sequence) -> AdapterFailed | None:
        """Only low-rank pairs can be weighted and added up."""
        if [weight for _, weight in sequence.adapters] == [1.0]:
            return None
        for key, _ in sequence.adapters:
            if self._by_key[key].extras_bytes:
                return AdapterFailed(
                    f"adapter {self._by_key[key].name!r} has weights that are no low-rank pairs "
                    "(DoRA, biases, embeddings, whole modules): it cannot be weighted or combined "
                    "with others; use it alone, with weight 1"
                )
        return None

    def _unstage(self, adapter: _Adapter) -> None:
        del self._staged[adapter.key]
        adapter.loaded, adapter.state = None, _State.COLD

    def _discard_unused(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self._by_key:
                self._discard_if_unused(self._by_key[key])

    def _discard_if_unused(self, adapter: _Adapter) -> None:
        """Forget an adapter that no name and no sequence refers to any more."""
        if adapter.is_registered or adapter.users or adapter.state is _State.LOADING:
            return
        if self._has_pages(adapter):
            if self._resident.is_pinned(adapter.key):
                return
            self._resident.evict(adapter.key)
        self._by_key.pop(adapter.key, None)

    def _join(self, sequence: Sequence) -> LoRASet:
        # Sorted by content, so that equal ensembles are one set however they were written down.
        parts = sorted(
            (self._by_key[key].content, weight, key) for key, weight in sequence.adapters
        )
        return join_lora_set(
            [(self._resident.pages(key), weight) for _, weight, key in parts],
            key="+".join(f"{weight!r}*{content}" for content, weight, _ in parts),
            # Adapters that have any run alone.
            extras=self._resident.extras(parts[0][2]),
        )


def _unknown(name: str, known: Collection[str]) -> UnknownAdapter:
    return UnknownAdapter(
        f"adapter {name!r} is not registered ({len(known)} are); register it first"
    )
