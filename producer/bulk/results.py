"""Results: one line of output each, and the segments in which they come.

A segment's blocks are ranges of ``RANGE_LINES`` input lines; its records are ``number TAB line``.
Of several results for one line the first counts, segments taken by name: what a worker answered
("answers-…") before the error of a line that was closed ("closed-…").
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from openlora.errors import OpenLoRAError
from openlora.protocol.bulk import BulkAnswer, BulkAnswers, BulkGroup, Shape, line_job_id
from openlora.protocol.codec import encode
from openlora.protocol.events import Token
from producer.bulk.blocks import Block, read_index, write_blocks
from producer.bulk.logprobs import chat_logprobs, plain_logprobs, text_logprobs
from producer.bulk.openai_body import chat_answer, text_answer
from producer.bulk.records import RANGE_LINES

MAX_MESSAGE_CHARS = 1000
HELD_BYTES = 32 << 20
"""Results of a range that are held at once; one with log-probabilities may have 600 KB."""

T = TypeVar("T")
_Place = tuple[Path, int, int]
"""(file, offset, bytes)."""


class PlainResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of a plain line; ``error`` comes last, where it is looked for."""

    line: int
    custom_id: str | None = None
    adapter: str | None = None
    text: str | None = None
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    logprobs: list[dict[str, object]] | None = None
    error: dict[str, str] | None = None


class OpenAIResult(msgspec.Struct, frozen=True):
    """The result of a line of OpenAI's form."""

    id: str
    custom_id: str | None
    response: dict[str, object] | None
    error: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class Result:
    """One line of output: ``data`` is JSON without a line end."""

    line: int
    data: bytes


def answered(bundle: BulkAnswers, created_s: int) -> list[Result]:
    """The results of a bundle of answers."""
    return [_answered(bundle, answer, created_s) for answer in bundle.answers]


def refused(
    batch_id: str,
    input_hash: str,
    line: int,
    shape: Shape,
    custom_id: str | None,
    error: OpenLoRAError,
) -> Result:
    """The result of a line that was not run."""
    fields = {"code": error.code, "message": error.message[:MAX_MESSAGE_CHARS]}
    if shape == "plain":
        return Result(line, encode(PlainResult(line, custom_id, error=fields)))
    request_id = f"batch_req_{line_job_id(batch_id, input_hash, line)}"
    return Result(line, encode(OpenAIResult(request_id, custom_id, None, fields)))


def _answered(bundle: BulkAnswers, answer: BulkAnswer, created_s: int) -> Result:
    group = bundle.group
    job_id = line_job_id(bundle.batch_id, bundle.input_hash, answer.line)
    error = None
    if answer.failure is not None:
        message = answer.failure.message[:MAX_MESSAGE_CHARS]
        error = {"code": answer.failure.code, "message": message}
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    if group.shape == "plain":
        return Result(answer.line, encode(_plain(group, answer, usage, error)))
    response = None
    if error is None:
        reason = answer.finish_reason or "stop"
        fields = (job_id, created_s, group.model, answer.text, reason, usage)
        if group.shape == "chat":
            body = chat_answer(*fields, _told(answer, chat_logprobs))
        else:
            body = text_answer(*fields, _told(answer, text_logprobs))
        response = {"status_code": 200, "request_id": job_id, "body": body}
    result = OpenAIResult(f"batch_req_{job_id}", answer.custom_id, response, error)
    return Result(answer.line, encode(result))


def _plain(
    group: BulkGroup, answer: BulkAnswer, usage: dict[str, int], error: dict[str, str] | None
) -> PlainResult:
    adapter = "+".join(ref.id for ref in group.adapters) or None
    if error is not None:
        return PlainResult(answer.line, answer.custom_id, adapter, error=error)
    return PlainResult(
        answer.line,
        answer.custom_id,
        adapter,
        answer.text,
        answer.finish_reason,
        usage,
        _told(answer, plain_logprobs),
    )


def _told(answer: BulkAnswer, shaped: Callable[[Sequence[Token]], T]) -> T | None:
    return None if answer.tokens is None else shaped(answer.tokens)


def write_segment(folder: Path, name: str, results: Iterable[Result]) -> None:
    """Write results as a segment, durably. Its name carries a digest of what is in it: a topic
    that began anew counts its offsets from 0 again, and must not overwrite the old one's answers.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    blocks: dict[int, list[bytes]] = {}
    digest = hashlib.sha256()
    for result in sorted(results, key=lambda result: result.line):
        record = b"%d\t%b\n" % (result.line, result.data)
        digest.update(record)
        blocks.setdefault(result.line // RANGE_LINES, []).append(record)
    if blocks:
        write_blocks(folder / f"{name}-{digest.hexdigest()[:12]}", blocks)


class SegmentReader:
    """The segments of a batch; where ranges ``first`` to ``last - 1`` lie in them, read once.

    There may be a segment for every few lines, so of all ranges it would be too much to hold.

    Raises (also ``range``):
        FileNotFoundError: the batch is over, and its segments are gone.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        # The folder goes before what is in it: now it is known that the names are all of them.
        folder.stat()
        self._indexes: list[tuple[Path, dict[int, Block], int]] = []
        for path in (folder / name for name in names):
            index, base = read_index(path)
            blocks = {n: block for n, block in index.blocks.items() if first <= n < last}
            if blocks:
                self._indexes.append((path, blocks, base))

    def holds(self, number: int) -> bool:
        """Whether there is any result of range ``number``."""
        return any(number in blocks for _, blocks, _ in self._indexes)

    def range(self, number: int) -> Iterator[bytes]:
        """The results of range ``number`` with their line ends, one a line, in line order.

        Where all of them are too much to hold, each is read when it is its turn.
        """
        places = [
            (path, base + blocks[number].offset, blocks[number].size)
            for path, blocks, base in self._indexes
            if number in blocks
        ]
        is_small = sum(size for _, _, size in places) <= HELD_BYTES
        return _held(places) if is_small else _one_by_one(places)


def _held(places: Iterable[_Place]) -> Iterator[bytes]:
    found: dict[int, bytes] = {}
    for path, offset, size in places:
        with path.open("rb") as file:
            file.seek(offset)
            records = file.read(size).splitlines(keepends=True)
        for record in records:
            line, _, data = record.partition(b"\t")
            found.setdefault(int(line), data)
    for line_number in sorted(found):
        yield found[line_number]


def _one_by_one(places: Iterable[_Place]) -> Iterator[bytes]:
    found: dict[int, _Place] = {}
    for path, offset, size in places:
        end = offset + size
        with path.open("rb") as file:
            file.seek(offset)
            for record in file:
                line, _, data = record.partition(b"\t")
                offset += len(record)
                found.setdefault(int(line), (path, offset - len(data), len(data)))
                if offset >= end:
                    break
    for line_number in sorted(found):
        path, offset, size = found[line_number]
        with path.open("rb") as file:
            yield os.pread(file.fileno(), size, offset)
