"""What a request's adapter names stand for: registered directories, or a merge of some of them.

All on the engine thread, and nothing of it reads an adapter's files.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from openlora.adapters.merge_cache import recipe
from openlora.adapters.merge_spec import MergeSpec
from openlora.adapters.stamp import Stamp, stamp
from openlora.engine.adapter_entry import unknown_adapter
from openlora.errors import AdapterFailed

MAX_MERGES = 256
"""Merges that stay registered; the one not asked for longest is forgotten."""


class Manager(Protocol):
    """What is needed of ``AdapterManager``."""

    def register(self, name: str, path: Path) -> None: ...
    def unregister(self, name: str) -> None: ...


class AdapterNames:
    """Names of an engine's adapters.

    Args:
        manager: loads and places what is registered with it.
        merge_dir: where merges are kept; None: a temporary directory of this engine.
    """

    def __init__(self, manager: Manager, merge_dir: str | None) -> None:
        self._manager = manager
        self._known: dict[str, tuple[Path, Stamp]] = {}
        self._merges: OrderedDict[str, None] = OrderedDict()
        self._temporary = None
        if merge_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="openlora-merged-")
        self._root = Path(merge_dir or self._temporary.name)  # type: ignore[union-attr]

    def register(self, name: str, path: Path) -> None:
        """Make ``name`` mean what ``path`` holds now for requests from now on."""
        found = (path, stamp(path))
        known = self._known.get(name)
        if known is not None and known != found and known[0] == path:
            # The same directory with other files: nothing of the old ones may be used.
            self._manager.unregister(name)
        self._manager.register(name, path)
        self._known[name] = found

    def unregister(self, name: str) -> None:
        """Forget ``name``. Raises UnknownAdapter: there is none."""
        self._manager.unregister(name)
        del self._known[name]

    def resolve(self, adapters: Mapping[str, float], merge: MergeSpec) -> Mapping[str, float]:
        """The registered names and weights that a request's adapters come to.

        One adapter, or the method "cat", is what it is: pages and their weights. Other merges are
        registered here, and are made when they are loaded.

        Raises:
            UnknownAdapter: a name is not registered.
            AdapterFailed: the directory for merges cannot be written.
        """
        if merge.method == "cat" or len(adapters) < 2:
            return adapters
        for name in adapters:
            if name not in self._known:
                raise unknown_adapter(name, len(self._known))
        parts = [(self._known[name][0], float(weight)) for name, weight in adapters.items()]
        try:
            directory = recipe(self._root, parts, merge)
        except OSError as error:
            raise AdapterFailed(
                f"the merge cannot be kept in {self._root}: {error}; free space there"
            ) from error
        self._manager.register(directory.name, directory)
        self._merges[directory.name] = None
        self._merges.move_to_end(directory.name)
        if len(self._merges) > MAX_MERGES:
            self._manager.unregister(self._merges.popitem(last=False)[0])
        return {directory.name: 1.0}

    def close(self) -> None:
        """Delete the temporary directory, if there is one."""
        if self._temporary is not None:
            self._temporary.cleanup()
