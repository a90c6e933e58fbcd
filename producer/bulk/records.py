"""What is known of a batch and of a file, and what a batch needs next. Pure.

    reading ─▶ planning ─▶ running ─▶ assembling ─▶ over
                  │           │           ▲
                  └──▶ closing ◀┘─────────┘      cancelled, expired, or no line can be run

Each arrow, and each turn of a phase, is one step: a short Celery task that may be run again at any
time, since its files are replaced by equal ones and its result counts once.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Phase = Literal["reading", "planning", "running", "closing", "assembling", "over"]
Ending = Literal["cancelled", "expired", "failed"]
StepKind = Literal["read", "plan", "publish", "close", "assemble", "finish"]

Part = Literal["answers", "errors"]

WINDOW_LINES = 16_384
"""Lines published and not answered: what a broker that keeps all in memory holds of a batch, what
is run again when it dies, and how far workers can look ahead for lines of the same adapter."""
WINDOW_BYTES = 64 << 20
RANGE_LINES = 4096
"""Input lines whose results are gathered and written together."""
STEP_LOST_MS = 60_000
"""A step without news for so long is queued again; its Celery worker was killed, or the queue."""
STALL_MS = 10_000
"""Lines that nobody has and nobody answered for so long were lost with a broker."""


class FileRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file of the store. ``batch_id`` and ``part`` for results, which are made by a batch."""

    id: str
    tenant: str
    filename: str
    purpose: str
    size: int
    created_ms: int
    sha256: str = ""
    batch_id: str = ""
    part: Literal["", Part] = ""


def result_file_id(batch_id: str, part: Part) -> str:
    """The ID under which a part of a batch's results is a file."""
    return f"file-{batch_id.removeprefix('batch_')}-{part}"


class BatchRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a batch is told when it is made. Times are Unix milliseconds."""

    id: str
    tenant: str
    input_file_id: str
    input_hash: str
    input_size: int
    input_mtime_ns: int
    created_ms: int
    expires_ms: int
    endpoint: str | None = None
    adapter: str | None = None
    completion_window: str = "24h"
    metadata: dict[str, str] = {}


class LineError(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line that cannot be run; ``line`` None: the input as a whole."""

    code: str
    message: str
    line: int | None = None


class BatchState(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as Redis has it at one moment. Field names are those of the Redis hash.

    Attributes:
        step, step_ms: the step that is queued or runs ("read:3"), and since when.
        offset, line: where the next chunk begins in the input; chunks: how many are written.
        total: lines with content, known at the end of reading.
        units, unit: how many portions to publish, and the next one.
        again: the next portion to publish once more, after a broker lost some; -1 for none.
        published: lines sent to workers; answered: those of them with an answer.
        done: lines that have their result; failed: those of them with an error.
        closed: chunks whose unfinished lines have got their error.
        part: ranges of the results that are written.
        results_lines, results_failed: what they hold.
    """

    record: BatchRecord
    phase: Phase = "reading"
    ending: Ending | None = None
    step: str = ""
    step_ms: int = 0
    problem: str = ""
    offset: int = 0
    line: int = 1
    chunks: int = 0
    total: int = 0
    units: int = 0
    unit: int = 0
    again: int = -1
    published: int = 0
    published_bytes: int = 0
    answered: int = 0
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    closed: int = 0
    part: int = 0
    answers_bytes: int = 0
    errors_bytes: int = 0
    results_lines: int = 0
    results_failed: int = 0
    started_ms: int = 0
    last_ms: int = 0
    ending_ms: int = 0
    assembling_ms: int = 0
    over_ms: int = 0

    @property
    def id(self) -> str:
        """The batch's ID."""
        return self.record.id

    @property
    def outstanding(self) -> int:
        """Lines that workers have or will get from the broker."""
        return max(0, self.published - self.answered)

    def is_expired(self, now_ms: int) -> bool:
        """Whether its window is over before its lines are."""
        is_open = self.ending is None and self.phase in ("reading", "planning", "running")
        return is_open and now_ms >= self.record.expires_ms

    @property
    def status(self) -> str:
        """The status as OpenAI names it."""
        if self.phase == "over":
            return self.ending or "completed"
        if self.ending == "cancelled":
            return "cancelling"
        if self.phase in ("reading", "planning"):
            return "validating"
        return "in_progress" if self.phase == "running" else "finalizing"


class Step(msgspec.Struct, frozen=True):
    """A task to queue."""

    kind: StepKind
    number: int

    @property
    def token(self) -> str:
        """How the batch's state names it."""
        return f"{self.kind}:{self.number}"


class Change(msgspec.Struct, frozen=True):
    """Fields to set without any work."""

    fields: dict[str, str | int]


def next_move(state: BatchState, now_ms: int, *, nothing_pending: bool) -> Step | Change | None:
    """What to do for a batch that has no step under way; None: wait.

    ``nothing_pending``: workers live, and none has or could fetch any line.
    """
    match state.phase:
        case "reading":
            return Step("read", state.chunks)
        case "planning":
            return Step("plan", 0)
        case "running":
            return _running(state, now_ms, nothing_pending=nothing_pending)
        case "closing":
            if state.closed < state.chunks:
                return Step("close", state.closed)
            return Change({"phase": "assembling", "assembling_ms": now_ms})
        case "assembling":
            if state.part * RANGE_LINES < state.line:
                return Step("assemble", state.part)
            return Step("finish", 0)
        case "over":
            return None


def _running(state: BatchState, now_ms: int, *, nothing_pending: bool) -> Step | Change | None:
    if state.ending is not None:
        return Change({"phase": "closing"})
    if state.done >= state.total:
        return Change({"phase": "assembling", "assembling_ms": now_ms})
    if 0 <= state.again < state.unit:
        return Step("publish", state.again)
    if state.unit < state.units and _has_room(state):
        return Step("publish", state.unit)
    if nothing_pending and state.unit and is_past(state.last_ms, STALL_MS, now_ms):
        return Change({"again": 0, "last_ms": now_ms})
    return None


def is_past(since_ms: int, limit_ms: int, now_ms: int) -> bool:
    """Whether more than ``limit_ms`` have passed since ``since_ms``; so too where the clock was set
    back by that much, which would hide it for as long."""
    return abs(now_ms - since_ms) > limit_ms


def _has_room(state: BatchState) -> bool:
    if not state.outstanding:
        return True
    bytes_a_line = state.published_bytes / max(1, state.published)
    window = min(WINDOW_LINES, WINDOW_BYTES / max(1.0, bytes_a_line))
    return state.outstanding <= window / 2
