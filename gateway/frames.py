"""The websocket's frames as text: client frames decoded with errors that help, server frames built.

``token_prefix`` and ``token_frame`` are the hot path: one frame per token and stream, so a frame
is assembled from a prefix made once per stream instead of encoded from an object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Any, get_args

import msgspec

from gateway.drafts import GenerateRequest
from openlora.errors import InvalidRequest, OpenLoRAError
from openlora.protocol.events import End, Token
from openlora.protocol.jobs import AdapterRef, Priority

MAX_REQUEST_ID_CHARS = 128
MAX_SHOWN_VALUE_CHARS = 80


class Generate(GenerateRequest, frozen=True, kw_only=True, tag="generate"):
    """Start a job."""

    request_id: str


class CancelFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cancel"):
    """Stop a request of this connection."""

    request_id: str


class ResumeFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="resume"):
    """Go on with a job's stream behind token ``after`` (-1: from the first).

    ``epoch``: the claim by which that token was made, as its frame or one before it said; 0 where
    the client does not know.
    """

    request_id: str
    job_id: str
    after: int = -1
    epoch: int = 0


ClientFrame = Generate | CancelFrame | ResumeFrame

_client_decoder: msgspec.json.Decoder[ClientFrame] = msgspec.json.Decoder(ClientFrame)
_encode = msgspec.json.Encoder().encode
_TYPES = "it must be 'generate', 'cancel' or 'resume'"
_ALLOWED = {
    "type": _TYPES,
    "priority": f"it must be {' or '.join(map(repr, get_args(Priority)))}",
}
"""Fields of few values, which the decoder's own words do not name."""
_PATH = re.compile(r" - at `\$(.*)`$")
_PATH_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


class BadFrame(InvalidRequest):
    """A frame that is no request; carries the request's ID where one can be made out."""

    def __init__(self, message: str, request_id: str | None) -> None:
        super().__init__(message)
        self.request_id = request_id


def decode_client_frame(text: str) -> ClientFrame:
    """``text`` as one of the three client frames, types checked.

    Raises:
        BadFrame: names the field, its value and what was expected there.
    """
    try:
        return _client_decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _explained(text, str(error)) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        constants: list[str] = []
        frame = _lenient(text, constants.append)
        reason = f"the frame is not JSON: {error}; send one JSON object"
        if frame is not None and constants:
            reason = f"the frame is not JSON, which has no {constants[0]}; send finite numbers"
        raise BadFrame(reason, _request_id(frame)) from error


def _explained(text: str, reason: str) -> BadFrame:
    """msgspec's reason gives the path; this adds the value found there and the request's ID."""
    frame = _lenient(text)
    if frame is None:
        return BadFrame(f"{reason}; send one JSON object with a type", None)
    request_id = _request_id(frame)
    match = _PATH.search(reason)
    if "type" not in frame:
        return BadFrame(f"type is missing: {_TYPES}", request_id)
    if match is None:
        return BadFrame(f"{reason} in the {str(frame['type'])[:32]!r} frame", request_id)
    path = match[1].lstrip(".")
    problem = _ALLOWED.get(path, reason[: match.start()])
    try:
        shown = _shown(_value_at(frame, match[1]))
    except (LookupError, TypeError, RecursionError):
        # of a name given twice msgspec met the first value and Python kept the last
        return BadFrame(f"{path}: {problem}; give each name once", request_id)
    return BadFrame(f"{path} is {shown}: {problem}", request_id)


def _lenient(
    text: str, on_constant: Callable[[str], object] = lambda name: None
) -> dict[str, Any] | None:
    """The frame as Python reads it: only to say what is wrong with it.

    ``on_constant``: told of each NaN and Infinity, which Python writes for floats and JSON has not.
    """
    try:
        frame = json.loads(text, parse_constant=on_constant)
    except (ValueError, RecursionError):
        return None
    return frame if isinstance(frame, dict) else None


def _request_id(frame: dict[str, Any] | None) -> str | None:
    """The ID an error can be sent under; a lone surrogate could not be encoded."""
    request_id = None if frame is None else frame.get("request_id")
    if not isinstance(request_id, str) or len(request_id) > MAX_REQUEST_ID_CHARS:
        return None
    return request_id if request_id.encode(errors="ignore").decode() == request_id else None


def _value_at(value: Any, path: str) -> Any:
    for key, index in _PATH_STEP.findall(path):
        value = value[key] if key else value[int(index)]
    return value


def _shown(value: object) -> str:
    shown = json.dumps(value)
    if len(shown) > MAX_SHOWN_VALUE_CHARS:
        return shown[:MAX_SHOWN_VALUE_CHARS] + "…"
    return shown


def accepted_frame(request_id: str, job_id: str, adapters: tuple[AdapterRef, ...]) -> str:
    """The job is durable: stored, and acknowledged by the broker."""
    return _text(
        {
            "type": "accepted",
            "request_id": request_id,
            "job_id": job_id,
            "adapters": [
                {"id": ref.id, "version": ref.version, "weight": ref.weight} for ref in adapters
            ],
        }
    )


def token_prefix(request_id: str, job_id: str) -> str:
    """The part that all token frames of a stream begin with."""
    head = _text({"type": "token", "request_id": request_id, "job_id": job_id})
    return head[:-1] + ',"index":'


def token_frame(prefix: str, index: int, token: Token) -> str:
    """One token's frame; the escaper is the C one of the standard library's ``json``."""
    if token.logprob is None:
        return (
            f'{prefix}{index},"token_id":{token.token_id},'
            f'"text":{encode_basestring(token.text)},"logprob":null}}'
        )
    alternatives = [
        {"token_id": other.token_id, "text": other.text, "logprob": other.logprob}
        for other in token.top_logprobs
    ]
    rest = _text({"logprob": token.logprob, "top_logprobs": alternatives})
    return (
        f'{prefix}{index},"token_id":{token.token_id},'
        f'"text":{encode_basestring(token.text)},{rest[1:]}'
    )


def with_epoch(frame: str, epoch: int) -> str:
    """A token's frame that also names the claim by which it and those behind it were made."""
    return f'{frame[:-1]},"epoch":{epoch}}}'


def restarted_frame(request_id: str, job_id: str) -> str:
    """The job runs again from its prompt; the next index is 0."""
    return _text({"type": "restarted", "request_id": request_id, "job_id": job_id})


def end_frame(request_id: str, job_id: str, end: End) -> str:
    """The last frame of a stream: ``done``, or ``error`` where the job failed."""
    if end.failure is not None:
        failure = end.failure
        return _text(
            {
                "type": "error",
                "request_id": request_id,
                "job_id": job_id,
                "code": failure.code,
                "message": failure.message,
                "retriable": failure.retriable,
            }
        )
    return _text(
        {
            "type": "done",
            "request_id": request_id,
            "job_id": job_id,
            "finish_reason": end.finish_reason,
            "usage": {
                "prompt_tokens": end.prompt_tokens,
                "completion_tokens": end.completion_tokens,
            },
            "timings": {
                "queue_ms": end.queue_ms,
                "ttft_ms": end.ttft_ms,
                "total_ms": end.total_ms,
            },
            "text": end.text,
        }
    )


def error_frame(error: OpenLoRAError, request_id: str | None, job_id: str | None = None) -> str:
    """An error; ``request_id`` is null where the frame at fault named none."""
    fields: dict[str, object] = {"type": "error", "request_id": request_id}
    if job_id is not None:
        fields["job_id"] = job_id
    fields |= error_fields(error)
    return _text(fields)


def error_fields(error: OpenLoRAError) -> dict[str, object]:
    """What websocket and HTTP say of an error alike."""
    fields: dict[str, object] = {
        "code": error.code,
        "message": error.message,
        "retriable": error.retriable,
    }
    if error.retry_after_ms is not None:
        fields["retry_after_ms"] = error.retry_after_ms
    return fields


def _text(fields: dict[str, Any]) -> str:
    return _encode(fields).decode()
