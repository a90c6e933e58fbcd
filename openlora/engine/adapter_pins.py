"""Adapters that are kept in pages whether requests use them or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from openlora.engine.adapter_entry import PIN, Adapter, State
from openlora.engine.residency import ResidentAdapters

logger = logging.getLogger(__name__)


class AdapterPins:
    """The pinned adapters: each has a user that never ends, and is held once it is in pages.

    Args:
        resident: whose pages they take.
        want: has an adapter loaded.
        make_resident: puts one that is staged into pages; False where there is no room.
        misfits: whether requests wait for adapters that would not fit beside what is held.
    """

    def __init__(
        self,
        resident: ResidentAdapters,
        want: Callable[[Adapter], None],
        make_resident: Callable[[str], bool],
        misfits: Callable[[], bool],
    ) -> None:
        self._resident = resident
        self._want = want
        self._make_resident = make_resident
        self._misfits = misfits
        self._pinned: dict[str, Adapter] = {}
        self._unheld: set[str] = set()

    @property
    def keys(self) -> Iterable[str]:
        """All that are pinned, in pages or not yet."""
        return self._pinned.keys()

    def set(self, adapters: Iterable[Adapter]) -> list[Adapter]:
        """Pin these and no others; those that failed are tried again.

        Returns:
            The adapters that are pinned no more.
        """
        wanted = {adapter.key: adapter for adapter in adapters}
        gone = [adapter for key, adapter in self._pinned.items() if key not in wanted]
        for adapter in gone:
            self.drop(adapter)
        for key, adapter in wanted.items():
            self._pinned[key] = adapter
            adapter.users.add(PIN)
            self._want(adapter)
        return gone

    def place(self) -> list[Adapter]:
        """Put those that were loaded into pages, as soon as there is room.

        Returns:
            The adapters that are pinned no more: there are too many.
        """
        dropped = []
        for key, adapter in list(self._pinned.items()):
            if self._resident.is_held(key):
                continue
            if key in self._unheld and key not in self._resident:
                # It had to go for one that would not have fitted beside it.
                self._unheld.discard(key)
                self._want(adapter)
            if adapter.state is not State.STAGED and key not in self._resident:
                continue
            if not self._make_resident(key):
                continue
            if self._resident.may_hold(key):
                with self._resident.as_if_held(key):
                    has_misfits = self._misfits()
                if has_misfits:
                    self._unheld.add(key)  # held once they have ended
                else:
                    self._resident.hold(key)
            else:
                logger.warning(
                    "adapter %s is not pinned: the pins would take more than half of the pages; "
                    "unpin others, or give the engine a larger adapter budget",
                    adapter.name,
                )
                self.drop(adapter)
                dropped.append(adapter)
        return dropped

    def drop(self, adapter: Adapter) -> None:
        """Pin an adapter no more, if it was."""
        if self._pinned.pop(adapter.key, None) is not None:
            self._unheld.discard(adapter.key)
            adapter.users.discard(PIN)
            self._resident.unhold(adapter.key)
