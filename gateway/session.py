"""Hop 1, the connection: a websocket session as a state machine without I/O.

Frames and news of jobs go in; actions come out, for the shell (``connection.py``) to carry out in
order. A wrong frame costs its sender one error frame: the session and its other requests go on.

    request_id:  new ── generate/resume ──▶ starting ── started ──▶ running ── ended ──▶ free again
                                               └────── failed ──────────────────────────▶ free again
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gateway.drafts import JobDraft, draft_of
from gateway.frames import (
    MAX_REQUEST_ID_CHARS,
    BadFrame,
    CancelFrame,
    Generate,
    ResumeFrame,
    decode_client_frame,
    error_frame,
)
from openlora.errors import InvalidRequest, OpenLoRAError, Overloaded, PayloadTooLarge
from openlora.protocol.names import is_job_id

MAX_FRAME_BYTES = 1 << 20
MAX_LIVE_REQUESTS = 256
RETRY_AFTER_MS = 1000
_REMEMBERED_ENDS = 1024


@dataclass(frozen=True, slots=True)
class Submit:
    """Make ``draft`` a job and stream it."""

    request_id: str
    draft: JobDraft


@dataclass(frozen=True, slots=True)
class Resume:
    """Stream an existing job behind token ``after``, made by the claim ``epoch`` (0: unknown)."""

    request_id: str
    job_id: str
    after: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """Mark the job of a live request as cancelled."""

    request_id: str
    job_id: str


@dataclass(frozen=True, slots=True)
class Send:
    """Send this text frame."""

    frame: str


Action = Submit | Resume | Cancel | Send


class Session:
    """The requests of one connection.

    ``live`` maps each request ID in use to its job's ID, or to None while the job is being made.
    """

    def __init__(self) -> None:
        self.live: dict[str, str | None] = {}
        self._cancel_when_started: set[str] = set()
        # A cancel that crosses its request's `done` on the wire is no mistake of the client.
        self._ended: deque[str] = deque(maxlen=_REMEMBERED_ENDS)

    def receive_text(self, text: str) -> list[Action]:
        """A text frame of the client; always returns, whatever is in it."""
        # a character is one byte or more, so the exact (and slower) count is rarely needed
        if len(text) > MAX_FRAME_BYTES or (
            len(text) * 4 > MAX_FRAME_BYTES and len(text.encode()) > MAX_FRAME_BYTES
        ):
            return [self.too_large(len(text.encode()))]
        try:
            frame = decode_client_frame(text)
        except BadFrame as error:
            return [Send(error_frame(error, error.request_id))]
        try:
            match frame:
                case Generate():
                    return [self._generate(frame)]
                case ResumeFrame():
                    return [self._resume(frame)]
                case CancelFrame():
                    return self._cancel(frame)
        except OpenLoRAError as error:
            return [Send(error_frame(error, frame.request_id[:MAX_REQUEST_ID_CHARS]))]

    def receive_bytes(self, size: int) -> list[Action]:
        """A binary frame of ``size`` bytes."""
        if size > MAX_FRAME_BYTES:
            return [self.too_large(size)]
        return [Send(error_frame(InvalidRequest("binary frame; send JSON as text frames"), None))]

    def too_large(self, size: int) -> Send:
        """The answer to a frame of ``size`` bytes, over the limit."""
        error = PayloadTooLarge(
            f"the frame has {size} bytes; the limit is {MAX_FRAME_BYTES}, so send less at once"
        )
        return Send(error_frame(error, None))

    def started(self, request_id: str, job_id: str) -> list[Action]:
        """The job of ``request_id`` is accepted (or found, for a resume)."""
        self.live[request_id] = job_id
        if request_id in self._cancel_when_started:
            self._cancel_when_started.remove(request_id)
            return [Cancel(request_id, job_id)]
        return []

    def ended(self, request_id: str) -> None:
        """The stream has sent its last frame; its ID may be used again."""
        del self.live[request_id]
        self._ended.append(request_id)

    def failed(self, request_id: str, error: OpenLoRAError) -> list[Action]:
        """The request came to nothing; its ID may be used again."""
        self.ended(request_id)
        self._cancel_when_started.discard(request_id)
        return [Send(error_frame(error, request_id))]

    def _generate(self, frame: Generate) -> Submit:
        self._check_new(frame.request_id)
        draft = draft_of(frame)
        self.live[frame.request_id] = None
        return Submit(frame.request_id, draft)

    def _resume(self, frame: ResumeFrame) -> Resume:
        self._check_new(frame.request_id)
        if not is_job_id(frame.job_id):
            raise InvalidRequest(
                f"job_id {frame.job_id[:64]!r} is no job ID; send the job_id of an accepted frame"
            )
        if not -1 <= frame.after < 1 << 53:
            raise InvalidRequest(
                f"after is {frame.after}; send the index of the last token received, -1 for none"
            )
        if not 0 <= frame.epoch < 1 << 53:
            raise InvalidRequest(
                f"epoch is {frame.epoch}; send the epoch that the newest token frame with one had, "
                "or leave it out"
            )
        self.live[frame.request_id] = None
        return Resume(frame.request_id, frame.job_id, frame.after, frame.epoch)

    def _cancel(self, frame: CancelFrame) -> list[Action]:
        request_id = frame.request_id
        if request_id not in self.live:
            if request_id in self._ended:
                return []
            raise InvalidRequest(
                f"request_id {request_id[:64]!r} is not running on this connection; nothing to "
                "cancel"
            )
        job_id = self.live[request_id]
        if job_id is None:
            self._cancel_when_started.add(request_id)
            return []
        return [Cancel(request_id, job_id)]

    def _check_new(self, request_id: str) -> None:
        if not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                f"request_id has {len(request_id)} characters; send 1 to {MAX_REQUEST_ID_CHARS}"
            )
        if request_id in self.live:
            raise InvalidRequest(
                f"request_id {request_id!r} is still running on this connection; choose another"
            )
        if len(self.live) >= MAX_LIVE_REQUESTS:
            raise Overloaded(
                f"{len(self.live)} requests run on this connection, the most it takes; send this "
                "one again when another has ended",
                retry_after_ms=RETRY_AFTER_MS,
            )
