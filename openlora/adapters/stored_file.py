"""Whether a store has a file byte for byte, read only where the store's word is not enough."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 20


def has_file(system: Any, place: str, file: Path) -> bool:
    """Whether ``place`` of an fsspec file system has the content of ``file``.

    Raises:
        Exception: the store does not answer, or has a file that it cannot read.
    """
    try:
        found = system.info(place)
    except FileNotFoundError:
        return False
    if found["size"] != file.stat().st_size:
        return False
    checksum = _md5_of(found)
    if checksum is not None and checksum == _md5(file):
        return True
    # It has no checksum, or one of parts, or is damaged.
    with system.open(place, "rb") as stored, file.open("rb") as own:
        return _are_equal(stored, own)


def _md5_of(info: Mapping[str, Any]) -> str | None:
    """In hex, as the store says: Google's, or S3's of what was uploaded in one part."""
    with contextlib.suppress(ValueError):
        if "md5Hash" in info:
            return base64.b64decode(info["md5Hash"]).hex()
    tag = info.get("ETag")
    return str(tag).strip('"') if tag else None


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _are_equal(stored: BinaryIO, own: BinaryIO) -> bool:
    while chunk := own.read(_CHUNK_BYTES):
        left = memoryview(chunk)
        while len(left):
            part = stored.read(len(left))
            if not part or part != left[: len(part)]:
                return False
            left = left[len(part) :]
    return not stored.read(1)
