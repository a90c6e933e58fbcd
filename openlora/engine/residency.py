"""Which adapters are in device pages: least recently used ones go, ones in use stay."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from openlora.adapters.extras import AdapterExtras
from openlora.adapters.pages import PagePool, SitePages
from openlora.adapters.tier_stats import TierCounter, TierStats
from openlora.engine.adapter_loads import Loaded

EXTRAS_BYTES = 1 << 30
"""A whole embedding or head of a large model is about as much."""
RECENT_LOADS = 8
"""Among how many a load's time counts: the first into each page touch memory for the first time,
which takes several times as long as all that follow."""
HELD_SHARE = 0.5
"""Of the pages, what pinned adapters may take: the rest is for all others."""


class ResidentAdapters:
    """Puts adapters into pages and takes them out. Keys name adapters; engine thread only.

    An adapter is pinned while a running sequence uses it and until the last launched step that
    names its pages is done; only then can its pages go to another one.

    Args:
        pool: the page pool's book-keeper.
        write: copies an adapter in host memory into its pages.
        extras_bytes: most memory of the placed adapters' extras.
        page_bytes: of one page of each site, for the statistics.

    Attributes:
        room_epoch: changes whenever an adapter may have become evictable.
        counter: what this tier has done.
        load_s: seconds that a load took, of the last few.
    """

    def __init__(
        self,
        pool: PagePool,
        write: Callable[[SitePages, Loaded], None],
        extras_bytes: int = EXTRAS_BYTES,
        page_bytes: Sequence[int] = (),
    ) -> None:
        self.room_epoch = 0
        self.counter = TierCounter()
        self.load_s = 0.0
        self._page_bytes = tuple(page_bytes) or (0,) * len(pool.num_pages)
        self._held: dict[str, None] = {}
        self.extras_bytes = extras_bytes
        self._extras: dict[str, AdapterExtras] = {}
        self._pool = pool
        self._write = write
        self._lru: dict[str, None] = {}  # the longest unused first
        self._completed_step = 0
        self._late_unpins: deque[tuple[int, tuple[str, ...]]] = deque()

    def __contains__(self, key: str) -> bool:
        return key in self._lru

    @property
    def keys(self) -> tuple[str, ...]:
        """All that are in pages, the longest unused first."""
        return tuple(self._lru)

    @property
    def num_pages(self) -> Sequence[int]:
        """Pages of each site, free or not."""
        return self._pool.num_pages

    def extras(self, key: str) -> AdapterExtras | None:
        """What an adapter that is resident has beside its pages."""
        return self._extras.get(key)

    def room_for(self, keys: Collection[str]) -> Sequence[int]:
        """Pages of each site that these adapters could have together: all but what others hold."""
        room = list(self.num_pages)
        for key in self._held:
            if key not in keys:
                room = [n - len(p) for n, p in zip(room, self._pool.pages(key), strict=True)]
        return room

    def extras_room_for(self, keys: Collection[str]) -> int:
        """Bytes of extras that they could have together: all but what others hold."""
        held = (self._extras.get(key) for key in self._held if key not in keys)
        return self.extras_bytes - sum(map(_size, held))

    def pages(self, key: str) -> SitePages:
        """The pages of an adapter that is resident."""
        return self._pool.pages(key)

    def is_pinned(self, key: str) -> bool:
        """Whether the adapter's pages are in use."""
        return self._pool.pins(key) > 0

    def any_pinned(self) -> bool:
        """Whether any pages are in use."""
        return any(self._pool.pins(key) for key in self._lru)

    def stats(self, names: Iterable[str]) -> TierStats:
        """The device tier; ``names`` of what is in it."""
        pool = self._pool
        used = [have - free for have, free in zip(pool.num_pages, pool.num_free, strict=True)]
        return self.counter.stats(
            "device",
            adapters=len(self._lru),
            bytes_used=self._bytes_of(used) + sum(map(_size, self._extras.values())),
            bytes_limit=self._bytes_of(pool.num_pages),
            names=tuple(names),
        )

    def hold(self, key: str) -> bool:
        """Never evict an adapter that is resident, until ``unhold``; False where it ``may_hold``
        not."""
        if not self.may_hold(key):
            return False
        self._held[key] = None
        return True

    @contextmanager
    def as_if_held(self, key: str) -> Iterator[None]:
        """What would be, if it were held: nobody need ask again for room afterwards."""
        self._held[key] = None
        try:
            yield
        finally:
            del self._held[key]

    def may_hold(self, key: str) -> bool:
        """Whether held adapters and this one would take no more than ``HELD_SHARE`` of any site's
        pages, and of the extras' memory."""
        counts = [0] * len(self.num_pages)
        extras_bytes = 0
        for each in {**self._held, key: None}:
            counts = [n + len(p) for n, p in zip(counts, self._pool.pages(each), strict=True)]
            extras_bytes += _size(self._extras.get(each))
        limits = [have * HELD_SHARE for have in self.num_pages]
        return extras_bytes <= self.extras_bytes * HELD_SHARE and all(
            count <= limit for count, limit in zip(counts, limits, strict=True)
        )

    def unhold(self, key: str) -> None:
        """Take back ``hold``, if there was one."""
        if key in self._held:
            del self._held[key]
            self.room_epoch += 1

    def is_held(self, key: str) -> bool:
        """Whether the adapter is never evicted."""
        return key in self._held

    def place(self, key: str, loaded: Loaded, is_wanted: Callable[[str], bool]) -> bool:
        """Write an adapter into pages, evicting others for it; False where too many are in use.

        Args:
            is_wanted: whether queued requests wait for an adapter; such go last, however long
                they have been unused.
        """
        if not self._make_room((*loaded.page_counts, _size(loaded.extras)), is_wanted):
            return False
        started = time.perf_counter()
        pages = self._pool.allocate(key, loaded.page_counts)
        assert pages is not None
        self._write(pages, loaded)
        if loaded.extras is not None:
            self._extras[key] = loaded.extras
        self._lru[key] = None
        seconds = time.perf_counter() - started
        self.counter.loaded(seconds)
        self.load_s += (seconds - self.load_s) / min(self.counter.loads, RECENT_LOADS)
        return True

    def evict(self, key: str) -> None:
        """Take an adapter's pages from it; it must not be pinned."""
        self._pool.free(key)
        self._held.pop(key, None)
        self._extras.pop(key, None)
        del self._lru[key]
        self.room_epoch += 1

    def pin(self, key: str) -> None:
        """Keep an adapter's pages in place, and count it as used now."""
        self._pool.pin(key)
        self._lru[key] = self._lru.pop(key)

    def unpin(self, key: str) -> None:
        """Take back one ``pin`` that no launched step has relied on."""
        self._pool.unpin(key)

    def unpin_after(self, step: int, keys: tuple[str, ...]) -> list[str]:
        """Take back one ``pin`` of each key once step number ``step`` is done.

        Returns:
            As ``complete``.
        """
        self._late_unpins.append((step, keys))
        return self.complete(self._completed_step)

    def complete(self, step: int) -> list[str]:
        """Step number ``step`` and all before it are done on the device.

        Returns:
            The keys whose pins were taken back.
        """
        self._completed_step = step
        unpinned: list[str] = []
        while self._late_unpins and self._late_unpins[0][0] <= step:
            unpinned += self._late_unpins.popleft()[1]
        for key in unpinned:
            self._pool.unpin(key)
            self.room_epoch += 1
        return unpinned

    def check_integrity(self) -> None:
        """Assert that pages and the order of use name the same adapters."""
        self._pool.check_integrity()
        assert self._lru.keys() == set(self._pool.owners())
        assert self._extras.keys() <= self._lru.keys()
        assert self._held.keys() <= self._lru.keys()
        assert sum(map(_size, self._extras.values())) <= self.extras_bytes

    def _make_room(self, wanted: Iterable[int], is_wanted: Callable[[str], bool]) -> bool:
        """Evict what is not pinned until there is room; nothing where that fails.

        Args:
            wanted: pages of each site, then bytes of extras.
        """
        free = (*self._pool.num_free, self.extras_bytes - sum(map(_size, self._extras.values())))
        missing = [want - have for want, have in zip(wanted, free, strict=True)]
        victims: list[str] = []
        idle = [key for key in self._lru if not self._pool.pins(key) and key not in self._held]
        for key in sorted(idle, key=is_wanted):
            if max(missing) <= 0:
                break
            freed = (*map(len, self._pool.pages(key)), _size(self._extras.get(key)))
            if not any(f for f, m in zip(freed, missing, strict=True) if m > 0):
                continue  # it has nothing of what is short
            victims.append(key)
            missing = [m - f for m, f in zip(missing, freed, strict=True)]
        if max(missing) > 0:
            return False
        for key in victims:
            self.evict(key)
            self.counter.evicted()
        return True

    def _bytes_of(self, pages: Sequence[int]) -> int:
        return sum(n * size for n, size in zip(pages, self._page_bytes, strict=True))


def _size(extras: AdapterExtras | None) -> int:
    return 0 if extras is None else extras.size_bytes
