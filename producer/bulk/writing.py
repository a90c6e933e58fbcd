"""Steps ``close``, ``assemble`` and ``finish``: every line gets its one result, in its place."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from openlora.protocol.bulk import BulkGroup
from producer.bulk.blocks import write_durably
from producer.bulk.chunks import chunk_records
from producer.bulk.files import is_failed
from producer.bulk.records import RANGE_LINES, BatchState, FileRecord, Part, result_file_id
from producer.bulk.results import SegmentReader
from producer.bulk.state import has_bit, now_ms
from producer.bulk.steps import Fields, Refusal, Tools, unfinished

ASSEMBLE_S = 2.0
ASSEMBLE_RANGES = 32
"""The results of one step come from these at most."""


class _WithId(msgspec.Struct):
    custom_id: str | None = None


def close(tools: Tools, state: BatchState, number: int) -> Fields:
    """The batch ends early: lines of chunk ``number`` without a result get their error."""
    tools.folder(state).settle_chunks()  # where the input was lost, there was no plan
    done = tools.states.finished_lines(state.id)
    error = unfinished(state)
    refusals = []
    for group, line, raw in chunk_records(tools.folder(state).chunk(number)):
        if not has_bit(done, line):
            shape = msgspec.json.decode(group, type=BulkGroup).shape
            custom_id = msgspec.json.decode(raw, type=_WithId).custom_id
            refusals.append(Refusal(line, shape, custom_id, error))
    tools.refuse(state, f"unfinished-{number:06d}", refusals, show=False)
    return {"closed": number + 1}


def assemble(tools: Tools, state: BatchState, number: int) -> Fields:
    """Write the results of ranges ``number``, … in order, as many as there is time for."""
    folder = tools.folder(state)
    end = number + ASSEMBLE_RANGES
    reader = SegmentReader(folder.segments, number, end) if state.total else None
    deadline = time.monotonic() + ASSEMBLE_S
    tally = _Tally(
        state.answers_bytes, state.errors_bytes, state.results_lines, state.results_failed
    )
    while number < end and number * RANGE_LINES < state.line:
        if reader is not None and reader.holds(number):
            write_durably(folder.result(number), tally.counting(reader.range(number)))
        number += 1
        if time.monotonic() > deadline:
            break
    return {"part": number, **dataclasses.asdict(tally)}


@dataclass(slots=True)
class _Tally:
    """What the results hold so far, by the names of the state's fields."""

    answers_bytes: int
    errors_bytes: int
    results_lines: int
    results_failed: int

    def counting(self, results: Iterable[bytes]) -> Iterator[bytes]:
        """The same results, counted as they pass."""
        for result in results:
            self.results_lines += 1
            if is_failed(result):
                self.results_failed += 1
                self.errors_bytes += len(result)
            else:
                self.answers_bytes += len(result)
            yield result


def finish(tools: Tools, state: BatchState, _: int) -> Fields:
    """The results become files; what only a running batch needs goes.

    What was counted while lines came gives way to what the results hold: an answer may have come
    between the look at a line and its closing.
    """
    record = state.record
    parts: tuple[tuple[Part, int], ...] = (
        ("answers", state.answers_bytes),
        ("errors", state.errors_bytes),
    )
    for part, size in parts:
        if size:
            tools.store.record(
                FileRecord(
                    id=result_file_id(record.id, part),
                    tenant=record.tenant,
                    filename=f"{record.id}-{part}.jsonl",
                    purpose="batch_output",
                    size=size,
                    created_ms=now_ms(),
                    batch_id=record.id,
                    part=part,
                )
            )
    tools.folder(state).remove_working_files()
    return {
        "phase": "over",
        "over_ms": now_ms(),
        "done": state.results_lines,
        "failed": state.results_failed,
    }
