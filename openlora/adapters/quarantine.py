"""What a store gave and was another content: a few are kept, for the operator to look at."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

QUARANTINE = ".quarantine"
MAX_KEPT = 4
"""Enough to look at; ten thousand must not fill the disk."""


def keep_aside(copy: Path, quarantine: Path, name: str) -> Path:
    """Move a directory to ``quarantine/name``, where the oldest go; the place that it has there.

    A disk that does not take it is no error: the copy is only to look at.
    """
    place = quarantine / name
    with contextlib.suppress(OSError):
        quarantine.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        copy.rename(place)
        kept = sorted(quarantine.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in kept[:-MAX_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return place
