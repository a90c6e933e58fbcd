"""The header of a safetensors file, read without trust in it. Stdlib only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from openlora.errors import AdapterFailed

MAX_HEADER_BYTES = 4 << 20
"""An adapter of a few thousand tensors has a header under 1 MiB. Parsing holds the interpreter's
lock, and with it all streams of the gateway that checks the adapter."""
_MAX_REMEMBERED_BYTES = 256 << 10
"""Of a header that is kept; one of 1,120 tensors, 80 layers' all linears, has 150 KB."""

_LENGTH_BYTES = 8
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: as safetensors names it ("F32", …).
        shape: its dimensions.
        file: name of the file that holds it.
        start, end: where its bytes are in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """What a file holds. Files alike in name, header and size give the same object while it is
    remembered, so that what follows from it need not be worked out again.

    Attributes:
        tensors: every tensor, by name.
    """

    tensors: Mapping[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Read and check the header of a file; no tensor data is read.

    Raises:
        AdapterFailed: the header is too long, is no JSON of the right form, or does not account
            for exactly the bytes that the file has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise AdapterFailed(f"{path.name} is cut short or is not a safetensors file")
        if length > MAX_HEADER_BYTES:
            raise AdapterFailed(
                f"{path.name} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
            )
        raw = file.read(length)
    return (_remembered if length <= _MAX_REMEMBERED_BYTES else _parsed)(path.name, raw, size)


def _parsed(name: str, raw: bytes, size: int) -> Header:
    """The header ``raw`` of a file of ``size`` bytes."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterFailed(f"{name} has a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise AdapterFailed(f"{name} has a header that is no JSON object")
    header.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + len(raw)
    entries = {
        tensor: _entry(name, tensor, fields, data_start) for tensor, fields in header.items()
    }
    _check_spans(name, entries.values(), data_start, size)
    return Header(MappingProxyType(entries))


# Adapters of one recipe have the same header to the byte, and parsing one holds the interpreter's
# lock for 3 ms: with a hundred loads a second, running steps would wait for it.
_remembered = lru_cache(maxsize=32)(_parsed)


def _entry(file: str, name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = (*shape, start, end)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a shape or offset is no number ≥ 0")
        if end - start != ITEM_BYTES[dtype] * math.prod(shape):
            raise ValueError("its bytes do not match its shape")
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFailed(f"{file}: tensor {name[:200]} is described wrongly: {error}") from error
    return TensorEntry(dtype, tuple(shape), file, data_start + start, data_start + end)


def _check_spans(file: str, entries: Iterable[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for start, end in sorted((entry.start, entry.end) for entry in entries):
        if start != position:
            raise AdapterFailed(f"{file}: tensors overlap or leave gaps at byte {position}")
        position = end
    if position != size:
        raise AdapterFailed(
            f"{file} holds {size - data_start} bytes of data; its header describes "
            f"{position - data_start}"
        )
