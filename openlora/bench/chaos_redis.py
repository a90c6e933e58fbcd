"""A Redis that comes back from a crash without its last moments, at will.

It writes what it acknowledged up to two seconds later (``appendfsync everysec``), so a crash takes
some of it or nothing, as chance has it. Here its journal is cut back to a moment of our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openlora.local import ServerProcess


@dataclass(frozen=True, slots=True)
class RedisMoment:
    """What ``journal``, the file of all writes since the start, held at a moment."""

    journal: Path
    size: int

    @classmethod
    def of(cls, server: ServerProcess) -> RedisMoment:
        """What an embedded Redis has on its disk now."""
        journal = max(
            server.log_path.parent.glob("appendonlydir/*.incr.aof"),
            key=lambda path: path.stat().st_mtime_ns,
        )
        return cls(journal, journal.stat().st_size)

    def fall_back(self) -> None:
        """Forget what was written since; the server must not run."""
        with self.journal.open("r+b") as journal:
            journal.truncate(self.size)
