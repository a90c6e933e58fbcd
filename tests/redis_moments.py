"""A Redis that comes back from a crash without its last moments, at will.

It writes what it acknowledged up to two seconds later (``appendfsync everysec``), so a crash takes
some of it or nothing, as chance has it. Here its file is cut back to a moment of the test's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import redis

from openlora.local import ServerProcess

KEEP_TIMEOUT_MS = 5000


@dataclass(frozen=True)
class Moment:
    """What ``file``, the journal of all writes, held then."""

    file: Path
    size: int

    def fall_back(self) -> None:
        """Forget what was written since; Redis must not run."""
        with self.file.open("r+b") as journal:
            journal.truncate(self.size)


def keep(server: ServerProcess) -> Moment:
    """Wait until the server's disk holds all that it acknowledged."""
    with redis.Redis.from_url(server.address) as client:
        kept, _ = client.execute_command("WAITAOF", 1, 0, KEEP_TIMEOUT_MS)
        assert kept == 1, "Redis did not write its journal in time"
    (file,) = server.log_path.parent.glob("appendonlydir/*.incr.aof")
    return Moment(file, file.stat().st_size)
