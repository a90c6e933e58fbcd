"""A batch's input as the stream that is sent: JSON lines as they are, CSV and Parquet as lines.

Whatever the size of the input, a little of it is in memory at a time.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from openlora.errors import InvalidRequest, OpenLoRAError

MAX_ROW_CHARS = 900_000
"""Of a CSV's line: a longer one is cut right behind, and refused with its number as too long."""
_SKIP_CHARS = 1 << 20
_TEXT_FIELDS = ("adapter", "custom_id")
_NUMBER_FIELDS = {
    "max_tokens": int,
    "seed": int,
    "top_k": int,
    "temperature": float,
    "top_p": float,
}


class Input:
    """A readable stream with the SHA-256 of all that was read from it.

    ``name``: as the file is to be called. Raises InvalidRequest from ``read`` where the input
    cannot be read as what it is said to be, or changed meanwhile.
    """

    def __init__(self, name: str, parts: Iterable[bytes]) -> None:
        self.name = name
        self._parts = iter(parts)
        self._rest = b""
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes (all for -1); b"" at the end."""
        if size < 0:
            data = b"".join([self._rest, *self._parts])
            self._rest = b""
        else:
            if not self._rest:
                self._rest = next(self._parts, b"")
            data, self._rest = self._rest[:size], self._rest[size:]
        self._digest.update(data)
        return data

    @property
    def sha256(self) -> str:
        """Of what was read so far."""
        return self._digest.hexdigest()


@contextmanager
def open_input(source: str, column: str) -> Iterator[Input]:
    """The input named by a path, an fsspec URL, or "-" (standard input).

    ``column``: of CSV and Parquet (told by the name's end), the one with the prompt. Their columns
    adapter, custom_id, max_tokens, temperature, top_p, top_k and seed are used too.

    Raises:
        InvalidRequest: it cannot be opened.
    """
    kind = PurePosixPath(source).suffix.lower()
    name = PurePosixPath(source).name if source != "-" else "stdin.jsonl"
    with _opened(source) as file:
        if kind == ".csv":
            parts = _as_lines(_csv_rows(file), column)
        elif kind == ".parquet":
            parts = _as_lines(_parquet_rows(file), column)
        else:
            parts = _blocks(file)
        yield Input(name, _unchanged(source, file, parts))


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
        return
    try:
        if "://" in source:
            import fsspec

            opened: Any = fsspec.open(source, "rb")
        else:
            opened = Path(source).expanduser().open("rb")
        with opened as file:
            yield file
    except OpenLoRAError:
        raise
    except (OSError, ValueError, ImportError) as error:
        # fsspec: ValueError for an unknown protocol, ImportError for one whose package is missing
        raise InvalidRequest(f"{source} cannot be read: {error}") from error
    except Exception as error:
        if "://" not in source:
            raise
        # Storage packages have errors of their own: no credentials, no such bucket, no network.
        raise InvalidRequest(f"{source} cannot be read: {type(error).__name__}: {error}") from error


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(1 << 18):
        yield block


def _unchanged(source: str, file: BinaryIO, parts: Iterable[bytes]) -> Iterator[bytes]:
    """``parts``, and then the check that the local file is still the one that was opened."""
    if "://" in source or source == "-":
        yield from parts
        return
    path = Path(source).expanduser()
    before = os.fstat(file.fileno())
    lines = 0
    for part in parts:
        lines += part.count(b"\n")
        yield part
    after = path.stat()
    facts = ("st_ino", "st_size", "st_mtime_ns")
    if any(getattr(before, fact) != getattr(after, fact) for fact in facts):
        raise InvalidRequest(
            f"{source} was changed while it was read, around line {lines + 1}; submit it again "
            "when nobody writes to it"
        )


def _as_lines(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[bytes]:
    for number, row in enumerate(rows, start=1):
        if number == 1 and column not in row:
            raise InvalidRequest(
                f"there is no column {column!r}; name the prompt's with --column, one of "
                f"{', '.join(map(str, row))}"
            )
        line = json.dumps(_line(row, column), ensure_ascii=False)
        # What is no UTF-8 is sent as it was, and refused with its line's number.
        yield line.encode("utf-8", "surrogateescape") + b"\n"


def _line(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    line: dict[str, Any] = {"prompt": row[column]}
    for name in _TEXT_FIELDS:
        if row.get(name) not in (None, ""):
            line[name] = str(row[name])
    for name, kind in _NUMBER_FIELDS.items():
        value = row.get(name)
        if value not in (None, ""):
            try:
                line[name] = kind(value)
            except (TypeError, ValueError):
                line[name] = value  # refused with its line's number, as what it is
    return line


def _csv_rows(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(2 * MAX_ROW_CHARS)
    reader = csv.DictReader(_bounded(text), restkey="", restval="")
    try:
        yield from reader
    except csv.Error as error:
        raise InvalidRequest(
            f"the CSV cannot be read at line {reader.line_num + 1}: {error}"
        ) from error


def _bounded(text: io.TextIOWrapper) -> Iterator[str]:
    """The lines; of one that is too long the beginning, with quotes open behind it as they are."""
    is_open = False
    while line := text.readline(MAX_ROW_CHARS + 1):
        is_open ^= line.count('"') % 2 == 1
        if len(line) > MAX_ROW_CHARS and not line.endswith("\n"):
            is_open_at_cut = is_open
            while rest := text.readline(_SKIP_CHARS):
                is_open ^= rest.count('"') % 2 == 1
                if rest.endswith("\n"):
                    break
            if is_open != is_open_at_cut:
                line += '"' if is_open_at_cut else ',"'
            line += "\n"
        yield line


def _parquet_rows(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InvalidRequest(
            "Parquet needs pyarrow; install it with: pip install 'openlora[parquet]'"
        ) from error
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InvalidRequest(f"the Parquet file cannot be read: {error}") from error
