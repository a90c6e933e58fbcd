"""What adapters are fetched from. Stdlib only."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol


class Cancelled(Exception):
    """Nobody wants what was being fetched any more."""


class Evicted(Exception):
    """An adapter went between its fetch and its reading: fetch it again."""


class Source(Protocol):
    """Where adapters come from."""

    @property
    def name(self) -> str:
        """For messages."""

    def fetch(self, content_hash: str, directory: Path, cancelled: threading.Event) -> None:
        """Copy an adapter's files into ``directory``, which exists and is empty.

        Raises:
            AdapterFailed: it is not there; asking again is of no use.
            OSError: the source does not answer, or the disk cannot be written.
            Cancelled: ``cancelled`` was set.
        """
