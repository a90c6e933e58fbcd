"""One line of a bundle while it runs, and a bundle's answers as messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from openlora.engine.detokenizer import Detokenizer
from openlora.engine.stop_checker import StopChecker
from openlora.protocol.bulk import BulkAnswer, BulkAnswers, BulkLine, BulkMessage
from openlora.protocol.codec import encode
from openlora.protocol.events import Candidate, Failure, FinishReason, Token
from workers.messages import Output

if TYPE_CHECKING:
    import tokenizers

ANSWERS_BYTES = 900_000
"""Most bytes of one message of answers; brokers take 1 MiB by default."""

_Logprobs = tuple[float, tuple[tuple[int, float], ...]]
"""A token's own logprob; (token ID, logprob) of the alternatives."""


class LineRun:
    """One line in the engine: its tokens so far, and how they become text.

    Only a line with stop strings is followed token by token; of the others the engine knows the
    end, and the text is decoded once.
    """

    __slots__ = (
        *("_checker", "_detokenizer", "_logprobs", "_texts", "_token_ids"),
        *("line", "prompt_tokens"),
    )

    def __init__(
        self,
        line: BulkLine,
        prompt_tokens: int,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.line = line
        self.prompt_tokens = prompt_tokens
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[_Logprobs] = []  # of each token, where the line asked
        self._checker = self._detokenizer = None
        if line.params.stop:
            self._checker = StopChecker(line.params.sampling(), eos_token_ids)
            self._detokenizer = Detokenizer(tokenizer, eos_token_ids)

    def take(self, output: Output) -> FinishReason | None:
        """Add the output's token; why the line is finished, where a stop string says so."""
        token_id = output.token_id
        assert token_id is not None
        self._token_ids.append(token_id)
        if output.logprob is not None:
            top = () if self.line.chosen_only else output.top_logprobs
            self._logprobs.append((output.logprob, top))
        if self._checker is None or self._detokenizer is None:
            return None
        text, reason = self._checker.feed(token_id, self._detokenizer.feed(token_id))
        self._texts.append(text)
        return reason

    def answer(
        self,
        reason: FinishReason | None,
        failure: Failure | None,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: tuple[int, ...],
    ) -> BulkAnswer:
        """What became of the line."""
        if failure is not None:
            text = ""
        elif self._checker is not None and self._detokenizer is not None:
            text = "".join(self._texts) + self._checker.finish(self._detokenizer.flush())
        else:
            shown = [token for token in self._token_ids if token not in eos_token_ids]
            text = tokenizer.decode(shown, skip_special_tokens=True)
        return BulkAnswer(
            self.line.line,
            self.line.custom_id,
            text,
            None if failure is not None else reason,
            self.prompt_tokens,
            len(self._token_ids),
            failure,
            self._tokens(tokenizer, eos_token_ids) if failure is None else None,
        )

    def _tokens(
        self, tokenizer: tokenizers.Tokenizer, eos_token_ids: tuple[int, ...]
    ) -> tuple[Token, ...] | None:
        if not self.line.params.logprobs:
            return None

        def text_of(token_id: int) -> str:
            return tokenizer.decode([token_id], skip_special_tokens=False)

        return tuple(
            Token(
                token_id,
                text_of(token_id),
                logprob,
                tuple(Candidate(other, text_of(other), value) for other, value in top),
            )
            for token_id, (logprob, top) in zip(self._token_ids, self._logprobs, strict=True)
            if token_id not in eos_token_ids
        )


def answer_messages(
    message: BulkMessage, answers: Sequence[BulkAnswer], worker_id: str
) -> list[bytes]:
    """The answers of a bundle in as few messages as brokers take."""

    def encoded(part: Sequence[BulkAnswer]) -> bytes:
        return encode(
            BulkAnswers(message.batch_id, message.input_hash, message.group, tuple(part), worker_id)
        )

    whole = encoded(answers)
    if len(whole) <= ANSWERS_BYTES:
        return [whole]
    if len(answers) == 1:
        failure = Failure(
            "payload_too_large", "the answer is longer than a message; lower max_tokens or logprobs"
        )
        answer = answers[0]
        return [encoded([BulkAnswer(answer.line, answer.custom_id, failure=failure)])]
    half = len(answers) // 2
    return [
        *answer_messages(message, answers[:half], worker_id),
        *answer_messages(message, answers[half:], worker_id),
    ]
