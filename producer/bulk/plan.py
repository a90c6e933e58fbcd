"""What is published when: the buckets of all chunks, cut into portions; and repeated custom_ids."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from producer.bulk.blocks import Index, write_durably
from producer.bulk.chunks import ids_of

UNIT_LINES = 4096
UNIT_BYTES = 8 << 20

Slice = tuple[int, int]
"""(chunk, bucket)."""


class Unit(msgspec.Struct, frozen=True):
    """A portion: published by one task."""

    slices: tuple[Slice, ...]


class Plan(msgspec.Struct, frozen=True):
    """All portions, in the order in which they are published."""

    units: tuple[Unit, ...]


def plan_units(indexes: Sequence[Index]) -> Plan:
    """Cut buckets, each with its slices of all chunks, into portions of about ``UNIT_LINES``.

    A bucket that fits stays whole, so that all lines of its adapters go out together.
    ``indexes``: of chunk 0, 1, …
    """
    by_bucket: dict[int, list[tuple[Slice, int, int]]] = {}
    for chunk, index in enumerate(indexes):
        for bucket, block in index.blocks.items():
            by_bucket.setdefault(bucket, []).append(((chunk, bucket), block.records, block.size))
    units: list[Unit] = []
    slices: list[Slice] = []
    lines = size = 0

    def cut() -> None:
        nonlocal lines, size
        if slices:
            units.append(Unit(tuple(slices)))
        slices.clear()
        lines = size = 0

    for bucket in sorted(by_bucket):
        entries = by_bucket[bucket]
        if lines and lines + sum(count for _, count, _ in entries) > UNIT_LINES:
            cut()
        for where, count, length in entries:
            slices.append(where)
            lines += count
            size += length
            if lines >= UNIT_LINES or size >= UNIT_BYTES:
                cut()
    cut()
    return Plan(tuple(units))


def write_plan(path: Path, plan: Plan) -> None:
    """Raises OSError."""
    write_durably(path, [msgspec.json.encode(plan)])


def read_plan(path: Path) -> Plan:
    """Raises OSError."""
    return msgspec.json.decode(path.read_bytes(), type=Plan)


def repeated_ids(paths: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """(line, the line that had its custom_id first), for all but the first of each custom_id.

    The pieces' sorted entries are merged, so memory does not grow with their number.
    """
    entries = heapq.merge(*(ids_of(path) for path in paths))
    first_line = 0
    for (digest, line), (next_digest, next_line) in pairwise(entries):
        if digest != next_digest:
            first_line = 0
            continue
        first_line = first_line or line
        yield next_line, first_line
