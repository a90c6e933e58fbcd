"""Chunks: the lines of one piece of the input, grouped by what they run on.

A chunk file's blocks are buckets: all lines of a group (adapters, form, model) are in the bucket
that the group hashes to, so one bucket of all chunks holds the whole of its groups. Records of a
bucket are runs: ``@`` and the group's JSON, then ``number TAB line's JSON`` for each line.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from openlora.protocol.codec import encode
from producer.bulk.blocks import read_block, read_index, write_blocks, write_durably
from producer.bulk.lines import Parsed

BUCKETS = 256
ID_BYTES = 16
_DIGEST_BYTES = 12
_LINE_BYTES = 4
_IDS_AT_ONCE = 512

Record = tuple[bytes, int, bytes]
"""(group's JSON, line number, line's JSON)."""


def write_chunk(path: Path, lines: Sequence[Parsed]) -> None:
    """Write the runnable lines of one piece. Raises OSError."""
    records = sorted((encode(p.group), p.line.line, encode(p.line)) for p in lines)
    blocks: dict[int, list[bytes]] = {}
    for group, run in groupby(records, key=lambda record: record[0]):
        block = blocks.setdefault(zlib.crc32(group) % BUCKETS, [])
        block.append(b"@%b\n" % group)
        block += [b"%d\t%b\n" % (line, raw) for _, line, raw in run]
    write_blocks(path, blocks)


def records_of(block: bytes) -> Iterator[Record]:
    """The records of a bucket, or of several joined."""
    group = b""
    for record in block.splitlines():
        if record.startswith(b"@"):
            group = record[1:]
        else:
            number, _, raw = record.partition(b"\t")
            yield group, int(number), raw


def chunk_records(path: Path) -> Iterator[Record]:
    """The records of a whole chunk, bucket by bucket. Raises OSError."""
    for bucket in read_index(path)[0].blocks:
        yield from records_of(read_block(path, bucket))


def write_ids(path: Path, lines: Iterable[tuple[str, int]]) -> None:
    """Write (custom_id, line number) of one piece as sorted fixed-size entries. Raises OSError."""
    entries = sorted(
        hashlib.blake2b(custom_id.encode(), digest_size=_DIGEST_BYTES).digest()
        + line.to_bytes(_LINE_BYTES)
        for custom_id, line in lines
    )
    write_durably(path, entries)


def ids_of(path: Path) -> Iterator[tuple[bytes, int]]:
    """(digest of a custom_id, line number), sorted. The file is open only while a part is read:
    the files of all pieces are gone through at once, and there may be thousands."""
    offset = 0
    while True:
        with path.open("rb") as file:
            file.seek(offset)
            part = file.read(_IDS_AT_ONCE * ID_BYTES)
        for first in range(0, len(part), ID_BYTES):
            entry = part[first : first + ID_BYTES]
            yield entry[:_DIGEST_BYTES], int.from_bytes(entry[_DIGEST_BYTES:])
        if not part:
            return
        offset += len(part)
