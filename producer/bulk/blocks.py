"""Files of blocks: immutable, written atomically and durably, each block readable by itself.

    first line   JSON: {"blocks": {number: [offset, bytes, records]}, …}
    then         the blocks, in the order of their numbers; offsets count from the second line

Both halves of a batch are shuffles, and both go through such files: lines are read in the file's
order and published by adapter, answers come by adapter and are written in the file's order. No
side ever holds more than one file's worth.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from openlora.errors import InternalError


class Block(msgspec.Struct, frozen=True, array_like=True):
    """Where a block lies behind the index line."""

    offset: int
    size: int
    records: int


class Index(msgspec.Struct, frozen=True, omit_defaults=True):
    """First line of the file. ``lines``: records in all."""

    blocks: dict[int, Block]
    lines: int = 0


_decode_index = msgspec.json.Decoder(Index).decode


def write_blocks(path: Path, blocks: Mapping[int, Sequence[bytes]]) -> None:
    """Write records (each with its line end) in blocks; a file of that name is replaced.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    index: dict[int, Block] = {}
    parts: list[bytes] = []
    offset = 0
    for number in sorted(blocks):
        part = b"".join(blocks[number])
        index[number] = Block(offset, len(part), len(blocks[number]))
        offset += len(part)
        parts.append(part)
    lines = sum(block.records for block in index.values())
    write_durably(path, [msgspec.json.encode(Index(index, lines)), b"\n", *parts])


def read_index(path: Path) -> tuple[Index, int]:
    """The index, and the byte at which the blocks begin.

    Raises:
        OSError: the file is gone. InternalError: it is none of ours.
    """
    with path.open("rb") as file:
        line = file.readline()
    try:
        return _decode_index(line), len(line)
    except msgspec.DecodeError as error:
        raise InternalError(f"{path} has no index line: {error}") from error


def read_block(path: Path, number: int) -> bytes:
    """One block's records; b"" where the file has no such block."""
    index, base = read_index(path)
    block = index.blocks.get(number)
    if block is None:
        return b""
    with path.open("rb") as file:
        return os.pread(file.fileno(), block.size, base + block.offset)


def write_durably(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that is there whole or not at all, also after the power failed.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make what was renamed into this folder outlive a power failure. Raises OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
