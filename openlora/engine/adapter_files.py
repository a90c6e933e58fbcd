"""Adapters' directories before they are read: remote ones are fetched, merges are made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from openlora.adapters.adapter_source import Source
from openlora.adapters.disk_cache import DiskCache
from openlora.adapters.merge_cache import is_made, materialize, parts_of
from openlora.adapters.tier_stats import TierStats
from openlora.engine.adapter_loads import Loaded
from openlora.engine.config import EngineConfig
from openlora.errors import AdapterFailed

KEEP_S = 10.0
"""What was fetched waits for so long to be read."""
READ_RETRIES_S = (0.05, 0.2)
"""Waits before a directory that could not be read is read again: shares hiccup."""


class AdapterFiles:
    """What adapters' paths stand for.

    Args:
        cache: of the remote store whose adapters' paths are in it; None: all paths are local.
        is_in_memory: whether one of the cache's adapters needs no reading.
    """

    def __init__(
        self,
        cache: DiskCache | None = None,
        is_in_memory: Callable[[Path], bool] = lambda path: False,
    ) -> None:
        self._cache = cache
        self._is_in_memory = is_in_memory

    def is_missing(self, path: Path) -> bool:
        """Whether ``fetch`` would have something to do; reads no adapter."""
        cache = self._cache
        # What the disk has let go of may be in memory still, and the store may be away.
        if cache is None or (cache.owns(path) and self._is_in_memory(path)):
            return False
        return any(not cache.has(at) for at in self._remote(path))

    def fetch(self, path: Path, cancelled: threading.Event) -> None:
        """Have on disk what ``path`` is made of. Raises as ``DiskCache.ensure``."""
        assert self._cache is not None
        for at in self._remote(path):
            self._cache.ensure(at, cancelled, KEEP_S)

    def loading(self, load: Callable[[Path], Loaded]) -> Callable[[Path], Loaded]:
        """``load`` of what is a directory by then, and stays one while it is read.

        It never fetches, which could take for ever: what has gone meanwhile raises ``Evicted``.
        """

        def load_sound(path: Path) -> Loaded:
            try:
                return load_ready(path)
            except AdapterFailed:
                # The machine may have lost power behind a fetch: what the store has is as good.
                if self._cache is None or not self._cache.drop_damaged(self._remote(path)):
                    raise
            return load_ready(path)

        def load_ready(path: Path) -> Loaded:
            with ExitStack() as stack:
                if self._cache is not None:
                    for at in self._remote(path):
                        stack.enter_context(self._cache.reading(at))
                for pause_s in (*READ_RETRIES_S, None):
                    try:
                        materialize(path)
                        return load(path)
                    except OSError:
                        if pause_s is None:
                            raise
                        time.sleep(pause_s)
            raise AssertionError("not reached")

        return load_sound

    def stats(self) -> tuple[TierStats, ...]:
        """The disk tier, where there is one."""
        return () if self._cache is None else (self._cache.stats(),)

    def _remote(self, path: Path) -> list[Path]:
        """Directories of the cache that ``path`` is, or is to be merged of."""
        cache = self._cache
        assert cache is not None
        if cache.owns(path):
            return [path]
        if is_made(path):
            return []
        return [part for part in parts_of(path) if cache.owns(part)]


def disk_cache(config: EngineConfig, source: Source | None = None) -> DiskCache | None:
    """The cache that the settings name, of ``source`` or their store; None: all paths are local.

    Raises:
        SetupError: the store's package is not installed.
    """
    if config.adapter_disk_dir is None or (config.adapter_store is None and source is None):
        return None
    root = Path(config.adapter_disk_dir)
    if source is None:
        # Not at the top: a plain directory needs no remote store's packages.
        from openlora.adapters.remote_store import RemoteStore

        assert config.adapter_store is not None
        source = RemoteStore(config.adapter_store, root, max_bytes=config.adapter_disk_bytes)
    return DiskCache(root, source, config.adapter_disk_bytes)
