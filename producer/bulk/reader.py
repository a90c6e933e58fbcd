"""Reads the lines of an input in pieces, from any byte on, holding no more than one piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase

MAX_LINE_BYTES = 900_000
"""A line travels in one message, and brokers take 1 MiB by default."""
_SKIP_BYTES = 1 << 20
_MARK = b"\xef\xbb\xbf"
"""With which some editors begin a file in UTF-8."""


@dataclass(frozen=True, slots=True)
class RawLine:
    """One line of the input.

    Attributes:
        number: counts from 1, blank lines included, as editors do.
        data: its bytes without the line end; None where it is over the limit.
        size: its length in bytes, also where ``data`` was not kept.
    """

    number: int
    data: bytes | None
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some consecutive lines, and where the next ones begin. Blank lines are left out.

    Attributes:
        offset, line: byte offset and number of the first line behind the piece.
        at_end: there is nothing behind it.
    """

    lines: tuple[RawLine, ...]
    offset: int
    line: int
    at_end: bool


def read_piece(
    file: BufferedIOBase, offset: int, line: int, *, max_lines: int, max_bytes: int
) -> Piece:
    """Lines from byte ``offset`` (the start of line ``line``) on, up to either limit.

    The piece ends with the line that reaches a limit, blank or not. A line over
    ``MAX_LINE_BYTES`` is passed over without being held. A last line without a line end counts: if
    it was cut off, it will not parse.
    """
    file.seek(offset)
    lines: list[RawLine] = []
    end = offset
    for raw, size in _lines(file):
        end += size
        if raw is not None and not offset and not lines:
            raw = raw.removeprefix(_MARK)
        if raw is None or raw.strip():
            lines.append(RawLine(line, raw, size))
        line += 1
        if len(lines) >= max_lines or end - offset >= max_bytes:
            break
    return Piece(tuple(lines), end, line, at_end=not file.read(1))


def _lines(file: BufferedIOBase) -> Iterator[tuple[bytes | None, int]]:
    """(line without its end, or None where it is too long; its size with the end)."""
    while data := file.readline(MAX_LINE_BYTES + 2):
        if len(data) <= MAX_LINE_BYTES or data.endswith(b"\n"):
            yield data.rstrip(b"\r\n"), len(data)
            continue
        size = len(data)
        while part := file.readline(_SKIP_BYTES):
            size += len(part)
            if part.endswith(b"\n"):
                break
        yield None, size
