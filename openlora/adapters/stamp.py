"""Whether an adapter's directory still holds what it held. Stdlib only."""

from __future__ import annotations

import os
import re
from pathlib import Path

_CONTENT_NAME = re.compile(r"[0-9a-f]{64}")

Stamp = tuple[tuple[str, int, int, int, int], ...]


def stamp(directory: Path) -> Stamp:
    """As ``files_stamp``; empty where the directory is named by its content: it never changes."""
    return () if _CONTENT_NAME.fullmatch(directory.name) else files_stamp(directory)


def files_stamp(directory: Path) -> Stamp:
    """(name, inode, modified, changed, size) of its files, by name, times in ns; another one after
    any change, also one that puts the time of modification back (``cp -p``, ``rsync -t``). Empty
    where the directory cannot be read (yet)."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    except OSError:
        return ()
    return tuple(
        sorted((name, s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size) for name, s in found)
    )
