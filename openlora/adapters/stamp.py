"""Whether an adapter's directory still holds what it held. Stdlib only."""

from __future__ import annotations

import os
import re
from pathlib import Path

_CONTENT_NAME = re.compile(r"[0-9a-f]{64}")

Stamp = tuple[tuple[str, int, int, int], ...]


def stamp(directory: Path) -> Stamp:
    """(name, inode, time of change in ns, size) of its files, by name; another one after any
    change. Empty where the directory is named by its content, or cannot be read (yet)."""
    if _CONTENT_NAME.fullmatch(directory.name):
        return ()
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except OSError:
        return ()
    return tuple(
        sorted((name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in found)
    )
