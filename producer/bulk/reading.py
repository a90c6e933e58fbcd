"""Steps ``read`` and ``plan``: the input becomes chunks of checked lines, and a plan."""

from __future__ import annotations

from array import array

import msgspec

from openlora.errors import InvalidRequest, OpenLoRAError, Overloaded, UnknownModel
from openlora.protocol.bulk import BulkGroup
from producer.bulk.blocks import read_index
from producer.bulk.chunks import chunk_records, write_chunk, write_ids
from producer.bulk.lines import Parsed, Rules, custom_id_of, parse_line, shape_of
from producer.bulk.plan import plan_units, repeated_ids, write_plan
from producer.bulk.reader import Piece, read_piece
from producer.bulk.records import BatchState, LineError
from producer.bulk.state import now_ms
from producer.bulk.steps import Fields, InputUnusable, Refusal, Tools, unfinished
from producer.bulk.workers_seen import heartbeats

CHUNK_LINES = 8192
CHUNK_BYTES = 8 << 20
MAX_LINES = 50_000_000
"""Of an input, blank ones included: Redis has a bit for each number up to the last line's."""


def read(tools: Tools, state: BatchState, number: int) -> Fields:
    """Read one piece of the input: its good lines into a chunk, the others to their error."""
    if state.ending is not None:
        return _drop(tools, state, number)
    rules = _rules(tools, state)
    piece = _piece(tools, state)
    parsed: list[Parsed] = []
    refusals: list[Refusal] = []
    for raw in piece.lines:
        try:
            parsed.append(parse_line(raw, rules))
        except OpenLoRAError as error:
            if isinstance(error, UnknownModel) and not rules.base_models:
                raise Overloaded(
                    f"line {raw.number} names a model and no worker lives to say whether it is "
                    "served; the batch goes on with the first worker"
                ) from error
            refusals.append(Refusal(raw.number, shape_of(raw, rules), custom_id_of(raw), error))
    folder = tools.folder(state)
    # Before the lines count as read: from then on nobody looks whether their adapters still exist.
    hashes = {adapter.hash for line in parsed for adapter in line.group.adapters}
    tools.states.hold_contents(state.id, hashes)
    # Before the chunk as well, which may replace one where these lines were good: that of another
    # reading, with other adapters. Whichever chunk counts, all other lines have their error.
    tools.refuse(state, f"refused-{number:06d}", refusals)
    ids = [(p.line.custom_id, p.line.line) for p in parsed if p.line.custom_id is not None]
    write_ids(folder.ids(number), ids)
    write_chunk(folder.unread_chunk(number), parsed)
    return _after(state, number, piece)


def _drop(tools: Tools, state: BatchState, number: int) -> Fields:
    """The batch has ended before all of its input was read: the lines of a piece get that as their
    error, whatever they say.

    They have it before their chunk is emptied, since a reading that began before the end may be
    under way beside this one, and either may be the one that counts.
    """
    piece = _piece(tools, state)
    rules, error = Rules(endpoint=state.record.endpoint), unfinished(state)
    refusals = [
        Refusal(raw.number, shape_of(raw, rules), custom_id_of(raw), error) for raw in piece.lines
    ]
    tools.refuse(state, f"unread-{number:06d}", refusals, show=False)
    folder = tools.folder(state)
    write_ids(folder.ids(number), ())
    write_chunk(folder.unread_chunk(number), ())
    return _after(state, number, piece)


def _after(state: BatchState, number: int, piece: Piece) -> Fields:
    return {
        "offset": piece.offset,
        "line": piece.line,
        "chunks": number + 1,
        "total": state.total + len(piece.lines),
        "phase": "planning" if piece.at_end else "reading",
    }


def plan(tools: Tools, state: BatchState, _: int) -> Fields:
    """All lines are known: refuse repeated custom_ids, and decide what is published when."""
    folder = tools.folder(state)
    folder.settle_chunks()
    _refuse_repeated(tools, state)
    units = plan_units([read_index(folder.chunk(n))[0] for n in range(state.chunks)])
    write_plan(folder.plan, units)
    now = now_ms()
    fields: dict[str, object] = {
        "phase": "running",
        "units": len(units.units),
        "started_ms": now,
        "last_ms": now,
    }
    newest = tools.states.get(state.id)
    if newest is not None and newest.done >= state.total and newest.ending is None:
        # Nothing can be run: said at once, and the results hold each line's error.
        fields |= {"phase": "assembling", "assembling_ms": now, "ending": "failed"}
        if not state.total:
            error = LineError("invalid_request", "the input has no line with content")
            tools.states.add_error(state.id, [error])
    return fields


def _rules(tools: Tools, state: BatchState) -> Rules:
    record = state.record
    served = {
        name for worker in heartbeats(tools.client) for name in (worker.model_id, worker.model)
    }
    return Rules(
        endpoint=record.endpoint,
        adapter=record.adapter,
        find=tools.adapters.finder(record.tenant),
        base_models=frozenset(served),
    )


def _piece(tools: Tools, state: BatchState) -> Piece:
    record = state.record
    path = tools.store.root / "files" / record.input_file_id
    try:
        with path.open("rb") as file:
            piece = read_piece(
                file, state.offset, state.line, max_lines=CHUNK_LINES, max_bytes=CHUNK_BYTES
            )
        found = path.stat()
    except FileNotFoundError as error:
        raise InputUnusable(f"the input is gone at line {state.line}; submit it again") from error
    if (found.st_size, found.st_mtime_ns) != (record.input_size, record.input_mtime_ns):
        raise InputUnusable(
            f"the input was changed while it was read, at line {state.line} "
            f"({record.input_size} bytes before, {found.st_size} now); submit it again"
        )
    if piece.line > MAX_LINES + 1:
        raise InputUnusable(f"the input has more than {MAX_LINES} lines; split it")
    return piece


def _refuse_repeated(tools: Tools, state: BatchState) -> None:
    folder = tools.folder(state)
    first_of = array("I")  # by line; there may be as many as lines
    for line, first in repeated_ids([folder.ids(number) for number in range(state.chunks)]):
        first_of = first_of or array("I", bytes(4 * state.line))
        first_of[line] = first
    if not first_of:
        return
    for number in range(state.chunks):
        refusals = []
        for group, line, raw in chunk_records(folder.chunk(number)):
            first = first_of[line]
            if not first:
                continue
            custom_id = msgspec.json.decode(raw)["custom_id"]
            error = InvalidRequest(f"custom_id {custom_id[:64]!r} is that of line {first} already")
            shape = msgspec.json.decode(group, type=BulkGroup).shape
            refusals.append(Refusal(line, shape, custom_id, error))
        tools.refuse(state, f"repeated-{number:06d}", refusals)
