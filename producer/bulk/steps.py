"""What steps work with, and which function does which step.

A step reads what is written, writes files, and returns new fields of the batch's state. Run twice,
it writes the same files again and marks the same lines, so nothing is doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import redis

from openlora.errors import DeadlineExceeded, InvalidRequest, OpenLoRAError
from openlora.protocol.bulk import Shape
from producer.bulk.adapters_known import KnownAdapters
from producer.bulk.files import BatchFolder, FileStore
from producer.bulk.records import BatchState, LineError, Step
from producer.bulk.results import refused, write_segment
from producer.bulk.sender import BundleSender
from producer.bulk.state import MAX_ERRORS, BatchStates, Mark

MAX_ERROR_CHARS = 400

Fields = Mapping[str, object]
Work = Callable[["Tools", BatchState, int], Fields]


class InputUnusable(InvalidRequest):
    """The input is not what it was when the batch was made, or too much: the batch fails."""


class BatchCancelled(OpenLoRAError):
    """The batch was cancelled before the line was run."""

    code = "batch_cancelled"


class Refusal(NamedTuple):
    """A line that ends without being run."""

    line: int
    shape: Shape
    custom_id: str | None
    error: OpenLoRAError


@dataclass(frozen=True, slots=True)
class Tools:
    """Everything that steps work with."""

    states: BatchStates
    store: FileStore
    adapters: KnownAdapters
    sender: BundleSender
    client: redis.Redis = field(repr=False)

    def folder(self, state: BatchState) -> BatchFolder:
        """Where the batch keeps its files."""
        return self.store.folder(state.id)

    def refuse(
        self,
        state: BatchState,
        segment: str,
        refusals: Sequence[Refusal],
        *,
        show: bool = True,
    ) -> None:
        """Give lines their error as a result; ``show``: the first ones with the batch as well.

        Raises:
            OSError: the disk is full. Overloaded: Redis does not answer.
        """
        if not refusals:
            return
        record = state.record
        results = [refused(record.id, record.input_hash, *refusal) for refusal in refusals]
        write_segment(self.folder(state).segments, segment, results)
        marks = [Mark(refusal.line, failed=True) for refusal in refusals]
        if self.states.mark(state.id, marks, source="reader", adapter="") > 0 and show:
            self.states.add_error(
                state.id,
                [
                    LineError(r.error.code, r.error.message[:MAX_ERROR_CHARS], r.line)
                    for r in refusals[:MAX_ERRORS]
                ],
            )


def unfinished(state: BatchState) -> OpenLoRAError:
    """The error of the lines that a batch which ended early had no result for."""
    if state.ending == "cancelled":
        return BatchCancelled("the batch was cancelled before this line was run")
    if state.ending == "expired":
        return DeadlineExceeded("the batch expired before this line was run")
    return InvalidRequest("the batch failed before this line was run; its errors say why")


def run_step(tools: Tools, state: BatchState, step: Step) -> Fields:
    """Do ``step`` of the batch; returns what changes in its state.

    Raises:
        InputUnusable: the batch cannot go on. Overloaded, OSError: not now; try again.
    """
    from producer.bulk.publishing import publish
    from producer.bulk.reading import plan, read
    from producer.bulk.writing import assemble, close, finish

    work: dict[str, Work] = {
        "read": read,
        "plan": plan,
        "publish": publish,
        "close": close,
        "assemble": assemble,
        "finish": finish,
    }
    return work[step.kind](tools, state, step.number)
