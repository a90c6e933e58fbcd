"""Bundles of a batch's lines on their way to workers, and the bundles of answers back.

One message carries up to 64 lines that share their adapters, one message of answers carries what
became of them. Lines have no log of their own: a bundle whose worker died is run again, and its
answers are told apart by line, of which one is kept.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from openlora.protocol.codec import checked_decoder
from openlora.protocol.events import Failure, FinishReason, Token
from openlora.protocol.jobs import AdapterRef, Message
from openlora.protocol.names import JOB_ID_LENGTH
from openlora.sampling_params import SEED_LIMIT, SamplingParams

RESULTS_TOPIC = "openlora.results"
COLLECTOR_GROUP = "openlora.collectors"
MAX_BUNDLE_LINES = 64
BULK_PREFIX = b'{"type":"bulk"'
"""How a bundle begins on the batch topic, which carries single jobs too."""

Shape = Literal["chat", "text", "plain"]
"""How a line was written, and so its answer: OpenAI's chat or text completion, or a plain line."""


class LineParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """``SamplingParams`` of one line, short on the wire: what is default is left out."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = 0

    def sampling(self, default_seed: int | None = None) -> SamplingParams:
        """The checked settings, with ``default_seed`` where the line names none.

        Raises:
            InvalidRequest: a value is out of range; names it.
        """
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=default_seed if self.seed is None else self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=self.logprobs,
        )


class BulkLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line to run, numbered from 1 as editors do, with exactly one of prompt and messages.

    ``chosen_only``: of its logprobs those of the tokens themselves are told, no alternatives.
    """

    line: int
    custom_id: str | None = None
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    params: LineParams = LineParams()
    chosen_only: bool = False


class BulkGroup(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all lines of a bundle share. ``model``: as the lines named it, for their answers."""

    shape: Shape
    model: str = ""
    adapters: tuple[AdapterRef, ...] = ()


class BulkMessage(msgspec.Struct, frozen=True, tag="bulk", omit_defaults=True):
    """Up to ``MAX_BUNDLE_LINES`` lines; nobody wants their answers after ``deadline_ms`` (Unix)."""

    batch_id: str
    input_hash: str
    deadline_ms: int
    group: BulkGroup
    lines: tuple[BulkLine, ...]


class BulkAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one line: a text with its ``finish_reason``, or a ``failure``.

    ``tokens``: where the line asked for logprobs; each one's text is that of its ID alone.
    """

    line: int
    custom_id: str | None = None
    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failure: Failure | None = None
    tokens: tuple[Token, ...] | None = None


class BulkAnswers(msgspec.Struct, frozen=True, tag="answers", omit_defaults=True):
    """The answers of a bundle, or of a part of it where they are long."""

    batch_id: str
    input_hash: str
    group: BulkGroup
    answers: tuple[BulkAnswer, ...]
    worker_id: str = ""


def line_job_id(batch_id: str, input_hash: str, line: int) -> str:
    """The job ID of a line: a hash of what it is, so that publishing it again changes nothing."""
    identity = f"{batch_id}:{input_hash}:{line}".encode()
    return hashlib.sha256(identity).hexdigest()[:JOB_ID_LENGTH]


def seed_of(job_id: str) -> int:
    """The seed of a line that names none: the same whenever and wherever the line is run."""
    return int(job_id[:16], 16) % SEED_LIMIT


def stop_key(batch_id: str) -> str:
    """String: there once nobody wants more answers of the batch (cancelled, expired)."""
    return f"openlora:{{{batch_id}}}:stop"


decode_bulk_message = checked_decoder(BulkMessage, "bundle of lines")
decode_bulk_answers = checked_decoder(BulkAnswers, "bundle of answers")
