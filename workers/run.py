"""One run of one job on this worker: the only mutable state of a job, owned by the loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from openlora.engine.detokenizer import Detokenizer
from openlora.engine.stop_checker import StopChecker, token_stop
from openlora.errors import OpenLoRAError
from openlora.joblog import ASK
from openlora.joblog.crashes import Suspicion
from openlora.protocol.events import Candidate, Chunk, End, Failure, FinishReason, Token
from openlora.protocol.jobs import Job
from workers.messages import Output, Start
from workers.offsets import Position

if TYPE_CHECKING:
    import tokenizers


def now_ms() -> float:
    """Unix time in milliseconds, as jobs carry it."""
    return time.time() * 1e3


def failure_of(error: OpenLoRAError) -> Failure:
    """What a client hears of ``error``."""
    return Failure(error.code, error.message, error.retriable)


class Run:
    """A claimed job: its tokens so far, how they become text, and what of it is in the log.

    Attributes:
        ticket: this run's number towards the engine.
        positions: the messages that stand for this job; a duplicate adds its own.
        tokens: all tokens from index 0, those of earlier workers included.
        logged: how many of them the log is known to hold.
        entries: how many chunks the log is known to hold; ASK where that is not known.
        end: set once, by ``finish`` or ``fail``; goes out with the next chunk.
        restarted: its claim opened a log that was lost, which the log's first chunk says.
        start: how the engine is to begin it, at its first token; None where it never will.
        suspicion: engines that crashed with it inside, before this run.
        last_heard: monotonic time of the log's last answer about this job.
    """

    __slots__ = (
        "_checker",
        "_detokenizer",
        "_eos_token_ids",
        "_first_token_ms",
        "_params",
        "_started_ms",
        "_tokenizer",
        "end",
        "entries",
        "epoch",
        "in_engine",
        "job",
        "last_heard",
        "logged",
        "positions",
        "prompt_tokens",
        "restarted",
        "start",
        "suspicion",
        "ticket",
        "tokens",
    )

    def __init__(
        self,
        job: Job,
        ticket: int,
        epoch: int,
        position: Position,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.job = job
        self.ticket = ticket
        self.epoch = epoch
        self.positions = [position]
        self.tokens: list[Token] = []
        self.logged = 0
        self.entries = ASK
        self.end: End | None = None
        self.restarted = False
        self.in_engine = False
        self.start: Start | None = None
        self.suspicion = Suspicion()
        self.prompt_tokens = 0
        self.last_heard = time.monotonic()
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, eos_token_ids)
        self._checker = StopChecker(job.params, eos_token_ids)
        self._eos_token_ids = eos_token_ids
        self._params = job.params
        self._started_ms = 0.0
        self._first_token_ms = 0.0

    def resume(self, chunks: Iterable[Chunk]) -> FinishReason | None:
        """Take over the logged tokens; detokeniser and stop checker end up as they were.

        Returns why the job is finished already, if the logged tokens say so.
        """
        reason: FinishReason | None = None
        self.entries = 0
        for chunk in chunks:
            self.entries += 1
            for token in chunk.tokens:
                self.tokens.append(token)
                text = self._detokenizer.feed(token.token_id)
                _, reason = self._checker.feed(token.token_id, text)
        self.logged = len(self.tokens)
        return reason

    def follows(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a log holds the beginning of our tokens; what it lacks is logged next then."""
        held = [token.token_id for chunk in chunks for token in chunk.tokens]
        if held != [token.token_id for token in self.tokens[: len(held)]]:
            return False
        self.logged = len(held)
        self.entries = len(chunks)
        return True

    def start_message(self) -> Start:
        """What makes the engine go on behind the tokens there are."""
        assert self.start is not None
        output_token_ids = tuple(token.token_id for token in self.tokens)
        return msgspec.structs.replace(
            self.start, ticket=self.ticket, output_token_ids=output_token_ids
        )

    def started(self) -> None:
        """The engine has it from now on."""
        self.in_engine = True
        self._started_ms = self._started_ms or now_ms()

    def take(self, output: Output) -> FinishReason | None:
        """Add one token of the engine; why the job is finished, if it is."""
        token_id = output.token_id
        assert token_id is not None
        if not self._first_token_ms:
            self._first_token_ms = now_ms()
        tokens, params = self.tokens, self._params
        text = self._detokenizer.feed(token_id)
        if params.stop:
            text, reason = self._checker.feed(token_id, text)
        else:
            reason = token_stop(token_id, len(tokens) + 1, params, self._eos_token_ids)
        if output.logprob is None:
            tokens.append(Token(token_id, text))
        else:
            tokens.append(Token(token_id, text, output.logprob, self._candidates(output)))
        return reason

    def _candidates(self, output: Output) -> tuple[Candidate, ...]:
        decode = self._tokenizer.decode
        return tuple(
            Candidate(token_id, decode([token_id], skip_special_tokens=False), logprob)
            for token_id, logprob in output.top_logprobs
        )

    def finish(self, reason: FinishReason) -> None:
        """The job ended with ``reason``; text still held back goes out with the end."""
        self.end = self._end(finish_reason=reason)

    def fail(self, failure: Failure) -> None:
        """The job ended without a whole answer."""
        self.end = self._end(failure=failure)

    def _end(
        self, finish_reason: FinishReason | None = None, failure: Failure | None = None
    ) -> End:
        created_ms = self.job.created_ms
        first_ms, started_ms = self._first_token_ms, self._started_ms
        return End(
            finish_reason=finish_reason,
            failure=failure,
            text=self._checker.finish(self._detokenizer.flush()),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.tokens),
            queue_ms=round(max(0.0, started_ms - created_ms), 3) if started_ms else 0.0,
            ttft_ms=round(max(0.0, first_ms - created_ms), 3) if first_ms else 0.0,
            total_ms=round(max(0.0, now_ms() - created_ms), 3),
        )

    def chunk(self) -> Chunk:
        """What the log does not hold yet; with nothing new it asks how the job stands."""
        return Chunk(
            self.job.job_id,
            self.epoch,
            self.logged,
            tuple(self.tokens[self.logged :]),
            self.end,
            self.restarted and self.entries < 1,
        )
