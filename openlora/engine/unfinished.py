"""The requests on their way, and what has come of them since the last step was read."""

from __future__ import annotations

from openlora.engine.adapter_manager import AdapterManager
from openlora.engine.request import FinishReason, TokenOutput
from openlora.engine.scheduler import Scheduler
from openlora.engine.sequence import Sequence
from openlora.engine.stats import ModelInfo
from openlora.engine.step import SampledToken
from openlora.engine.stop_checker import token_stop
from openlora.errors import InternalError, OpenLoRAError


class UnfinishedRequests:
    """Begins and ends sequences: each that ends leaves the scheduler and frees its adapters.

    Attributes:
        num_output_tokens: tokens taken so far, of all requests.

    Args:
        scheduler: runs the sequences.
        adapters: keeps their adapters.
        model: its context length and EOS tokens.
    """

    def __init__(self, scheduler: Scheduler, adapters: AdapterManager, model: ModelInfo) -> None:
        self.num_output_tokens = 0
        self._scheduler = scheduler
        self._adapters = adapters
        self._model = model
        self._sequences: dict[int, Sequence] = {}
        self._outputs: list[TokenOutput] = []

    def __bool__(self) -> bool:
        """Whether a request is unfinished, or an output has not been drained."""
        return bool(self._sequences or self._outputs)

    @property
    def has_outputs(self) -> bool:
        """Whether ``drain`` would return something."""
        return bool(self._outputs)

    @property
    def has_interactive(self) -> bool:
        """Whether one of them is no line of a batch."""
        return any(sequence.priority == "interactive" for sequence in self._sequences.values())

    def get(self, request_id: int) -> Sequence | None:
        """The sequence of a request that has not ended."""
        return self._sequences.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; one that was resumed after its last token ends at once."""
        self._sequences[sequence.sequence_id] = sequence
        self._scheduler.add(sequence)
        if sequence.num_output_tokens and (reason := self._stop(sequence)) is not None:
            index = sequence.num_output_tokens
            self._end(
                sequence, TokenOutput(sequence.sequence_id, index, None, finish_reason=reason)
            )

    def take(self, sequence: Sequence, token: SampledToken) -> None:
        """A step drew ``token`` for the sequence."""
        if token.token_id < 0:
            self._fail_not_finite(sequence)
            return
        index = sequence.num_output_tokens
        sequence.token_ids.append(token.token_id)
        self.num_output_tokens += 1
        reason = self._stop(sequence)
        output = TokenOutput(
            sequence.sequence_id, index, token.token_id, token.logprob, token.top_logprobs, reason
        )
        if reason is None:
            self._outputs.append(output)
        else:
            self._end(sequence, output)

    def fail(self, sequence: Sequence, error: OpenLoRAError, *, forget: bool = False) -> None:
        """End the sequence with an error; ``forget`` drops its KV from the prefix cache."""
        index = sequence.num_output_tokens
        self._end(sequence, TokenOutput(sequence.sequence_id, index, None, error=error), forget)

    def drop(self, sequence: Sequence, forget: bool = False) -> None:
        """End the sequence without a word."""
        self._scheduler.finish(sequence, forget=forget)
        self._adapters.drop(sequence.sequence_id, sequence.adapters)
        del self._sequences[sequence.sequence_id]

    def drain(self) -> list[TokenOutput]:
        """The outputs since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def put_back(self, outputs: list[TokenOutput]) -> None:
        """Outputs that were drained and not used come with the next ones."""
        self._outputs += outputs

    def _stop(self, sequence: Sequence) -> FinishReason | None:
        num_tokens = sequence.num_output_tokens
        reason = token_stop(
            sequence.token_ids[-1], num_tokens, sequence.params, self._model.eos_token_ids
        )
        if reason is None and num_tokens >= sequence.max_output_tokens:
            return "length"
        return reason

    def _fail_not_finite(self, sequence: Sequence) -> None:
        dtype = self._model.dtype
        source = f"the base model's weights overflow in {dtype}"
        if sequence.adapters:
            source = f"the adapter's weights, or the base model's, overflow in {dtype}"
        message = (
            f"the logits of output token {sequence.num_output_tokens} are not finite; {source}"
            + ("; try bfloat16 or float32" if dtype == "float16" else "")
        )
        # Its KV may hold the same: no later request shall find it in the prefix cache.
        self.fail(sequence, InternalError(message), forget=True)

    def _end(self, sequence: Sequence, output: TokenOutput, forget: bool = False) -> None:
        self._outputs.append(output)
        self.drop(sequence, forget)
