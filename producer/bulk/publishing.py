"""Step ``publish``: a portion of the lines goes to the batch topic, adapter by adapter."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from openlora.joblog import hints
from openlora.protocol.bulk import MAX_BUNDLE_LINES, BulkGroup
from openlora.protocol.codec import encode
from producer.bulk.blocks import read_block
from producer.bulk.chunks import records_of
from producer.bulk.plan import read_plan
from producer.bulk.records import BatchState
from producer.bulk.state import has_bit, now_ms
from producer.bulk.steps import Fields, Tools
from producer.partitioner import key_of_adapters

BUNDLE_BYTES = 256 << 10


class _Bundle(msgspec.Struct, frozen=True, tag="bulk"):
    """A ``BulkMessage`` whose parts are JSON already."""

    batch_id: str
    input_hash: str
    deadline_ms: int
    group: msgspec.Raw
    lines: list[msgspec.Raw]


def publish(tools: Tools, state: BatchState, number: int) -> Fields:
    """Publish portion ``number``, but for lines that have their result."""
    folder = tools.folder(state)
    unit = read_plan(folder.plan).units[number]
    done = tools.states.finished_lines(state.id)
    by_group: dict[bytes, list[msgspec.Raw]] = {}
    lines = 0
    for chunk, bucket in unit.slices:
        for group, line, raw in records_of(read_block(folder.chunk(chunk), bucket)):
            if not has_bit(done, line):
                by_group.setdefault(group, []).append(msgspec.Raw(raw))
                lines += 1
    bundles: list[tuple[bytes | None, bytes]] = []
    for group in sorted(by_group):
        key = key_of_adapters(msgspec.json.decode(group, type=BulkGroup).adapters)
        for part in _bundles(by_group[group]):
            record = state.record
            bundle = _Bundle(
                record.id, record.input_hash, record.expires_ms, msgspec.Raw(group), part
            )
            bundles.append((key, encode(bundle)))
    tools.sender.send(bundles)
    hints.say(tools.client)
    if number == state.again:
        return {"again": number + 1 if number + 1 < state.unit else -1, "last_ms": now_ms()}
    return {
        "unit": number + 1,
        "published": state.published + lines,
        "published_bytes": state.published_bytes + sum(len(value) for _, value in bundles),
        "last_ms": now_ms(),
    }


def _bundles(lines: list[msgspec.Raw]) -> Iterator[list[msgspec.Raw]]:
    bundle: list[msgspec.Raw] = []
    size = 0
    for line in lines:
        length = len(memoryview(line))
        if bundle and (len(bundle) >= MAX_BUNDLE_LINES or size + length > BUNDLE_BYTES):
            yield bundle
            bundle, size = [], 0
        bundle.append(line)
        size += length
    if bundle:
        yield bundle
