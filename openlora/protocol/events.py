"""What a worker says of a job: chunks of tokens and its end. One ``Chunk`` is one log entry.

Arrays instead of objects keep the hot path small: a chunk of one token is about 70 bytes. They hold
no cycles, so that the garbage collector need not look at them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled"]


class Candidate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An alternative at one position."""

    token_id: int
    text: str
    logprob: float


class Token(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One generated token: its ID, the text it completes, and what logprobs were asked for."""

    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[Candidate, ...] = ()


class Failure(msgspec.Struct, frozen=True):
    """Why a job ended without an answer."""

    code: str
    message: str
    retriable: bool = False


class End(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a job ended: with ``finish_reason``, or with ``failure``.

    ``text`` is what a stop string or an incomplete character still held back.
    Timings are measured at the worker from the job's ``created_ms``.
    """

    finish_reason: FinishReason | None = None
    failure: Failure | None = None
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Consecutive tokens of one job from ``first_index`` on, and its end on the last chunk.

    ``epoch`` is the claim's that it goes by: a chunk of an older epoch is refused by the log.
    A chunk with ``restarted`` set opens a log that was lost: readers start again from index 0.
    """

    job_id: str
    epoch: int
    first_index: int
    tokens: tuple[Token, ...] = ()
    end: End | None = None
    restarted: bool = False
