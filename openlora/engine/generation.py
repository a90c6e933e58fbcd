"""``Engine.generate``: requests in, completions out, with text and stop strings on top of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from openlora.engine.detokenizer import Detokenizer
from openlora.engine.request import Completion, FinishReason, Request, TokenOutput
from openlora.engine.stop_checker import StopChecker
from openlora.errors import InvalidRequest, OpenLoRAError

if TYPE_CHECKING:
    from openlora.engine.engine import Engine

_LOAD_WAIT_S = 0.1


def load_tokenizer(model: str) -> Tokenizer | None:
    """The tokenizer beside a model's weights, None where there is none."""
    file = Path(model) / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


@dataclass(slots=True)
class _Output:
    """One request's output as it grows."""

    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    detokenizer: Detokenizer | None = None
    checker: StopChecker | None = None
    finish_reason: FinishReason | None = None
    error: OpenLoRAError | None = None
    has_ended: bool = False

    def feed(self, token_id: int) -> FinishReason | None:
        """Take a token; "stop" where its text completes a stop string."""
        if self.detokenizer is None or self.checker is None:
            return None
        text, stop = self.checker.feed(token_id, self.detokenizer.feed(token_id))
        self.texts.append(text)
        return stop

    def end(self, finish_reason: FinishReason | None, error: OpenLoRAError | None) -> None:
        self.finish_reason, self.error, self.has_ended = finish_reason, error, True
        if self.detokenizer is not None and self.checker is not None:
            # After a stop string nothing of the rest is shown: the checker knows.
            self.texts.append(self.checker.finish(self.detokenizer.flush()))

    def completion(self) -> Completion:
        return Completion(
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            text="".join(self.texts) if self.detokenizer is not None else None,
            logprobs=tuple(self.logprobs),
            error=self.error,
        )


def generate(
    engine: Engine,
    requests: Sequence[Request],
    tokenizer: Tokenizer | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Completion], list[TokenOutput]]:
    """Run ``requests`` to their ends.

    Returns:
        Completions in the order of the requests, and what came for other requests meanwhile.

    Raises:
        InvalidRequest, PromptTooLong, UnknownAdapter: a request is wrong; none has run then.
    """
    outputs: dict[int, _Output] = {}
    try:
        for request in requests:
            output = _start(request, tokenizer, engine.model_info.eos_token_ids)
            request_id = engine.add(request)
            outputs[request_id] = output
            if output.has_ended:
                engine.abort(request_id)
    except OpenLoRAError:
        for request_id in outputs:
            engine.abort(request_id)
        raise
    others: list[TokenOutput] = []
    num_done = sum(output.has_ended for output in outputs.values())
    while num_done < len(outputs):
        step = engine.step()
        if not step:
            engine.wait_for_adapters(_LOAD_WAIT_S)
        for token in step:
            output_of = outputs.get(token.request_id)
            if output_of is None:
                others.append(token)
            elif not output_of.has_ended:
                _take(engine, output_of, token)
                num_done += output_of.has_ended
                if progress is not None and output_of.has_ended:
                    progress(num_done, len(outputs))
    return [output.completion() for output in outputs.values()], others


def _start(request: Request, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int]) -> _Output:
    output = _Output(list(request.output_token_ids))
    if tokenizer is not None:
        output.detokenizer = Detokenizer(tokenizer, eos_token_ids)
        output.checker = StopChecker(request.params, eos_token_ids)
        if "stop" in [output.feed(token_id) for token_id in request.output_token_ids]:
            output.end("stop", None)
    elif request.params.stop:
        raise InvalidRequest(
            f"stop strings {request.params.stop!r} need a tokenizer, and there is no "
            "tokenizer.json beside the model; send no stop strings or add the file"
        )
    return output


def _take(engine: Engine, output: _Output, token: TokenOutput) -> None:
    finish_reason = token.finish_reason
    if token.token_id is not None:
        output.token_ids.append(token.token_id)
        if token.logprob is not None:
            output.logprobs.append(token.logprob)
        if output.feed(token.token_id) == "stop" and finish_reason != "stop":
            finish_reason = "stop"
            engine.abort(token.request_id)
    if finish_reason is not None or token.error is not None:
        output.end(finish_reason, token.error)
