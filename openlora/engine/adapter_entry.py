"""What the engine knows of one registration of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from openlora.engine.adapter_loads import Loaded
from openlora.errors import UnknownAdapter

PIN = -1
"""Stands for a pin among the users of an adapter; requests count from 1."""


class State(Enum):
    """Of an adapter's copy in host memory; whether it is in pages is residency's to know."""

    COLD = auto()
    FETCHING = auto()
    LOADING = auto()
    STAGED = auto()


@dataclass(slots=True, eq=False)
class Adapter:
    """One registration of a name.

    Attributes:
        key: names this registration alone.
        loaded: in host memory while staged.
        content, page_counts, extras_bytes, inexact, num_added: known after its first load; no
            extras take 0 bytes, what of them cannot be weighted or added up is said in words, and
            added tokens are behind the base's vocabulary.
        users: IDs of the unfinished sequences with it, and ``PIN``.
    """

    key: str
    name: str
    path: Path
    state: State = State.COLD
    loaded: Loaded | None = None
    content: str = ""
    page_counts: tuple[int, ...] = ()
    extras_bytes: int = 0
    inexact: str = ""
    num_added: int = 0
    is_registered: bool = True
    users: set[int] = field(default_factory=set)

    @property
    def is_pinned(self) -> bool:
        """Whether it is to be kept in pages, used or not."""
        return PIN in self.users

    def learn(self, loaded: Loaded) -> None:
        """Take over what only the files tell."""
        self.content, self.page_counts = loaded.info.hash, tuple(loaded.page_counts)
        if loaded.extras is not None:
            self.extras_bytes = loaded.extras.size_bytes
            self.inexact = loaded.extras.inexact
            self.num_added = loaded.extras.num_added


def unknown_adapter(name: str, num_known: int) -> UnknownAdapter:
    """No adapter of this name."""
    return UnknownAdapter(
        f"adapter {name!r} is not registered ({num_known} are); register it first"
    )
