"""One engine step as data: what the scheduler decides and the runner executes.

The runner samples on its device, so logits never travel; ``launch`` may return before the device
has finished, so that the next step is prepared meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from openlora.adapters.lora_set import LoRASet
from openlora.sampling_params import SamplingParams

PENDING_TOKEN = -1
"""In ``StepRow.token_ids``: the token that the step before drew for this sequence, which the host
has not read. Only a runner that takes steps ahead meets it."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How a row's next token is drawn.

    ``output_index`` and ``seed`` key the noise; the token lists feed the penalties, are empty where
    ``params`` has none, and are read during ``launch`` only.
    """

    params: SamplingParams
    seed: int
    output_index: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepRow:
    """One sequence's share of a step.

    Attributes:
        sequence_id: the engine's request ID.
        token_ids: the tokens whose KV is computed in this step (1 in decode, a chunk in prefill).
        start: position of the first of them; KV of positions 0..start-1 is in the blocks already.
        block_table: KV block IDs covering positions 0..start+len(token_ids)-1.
        lora_set: the row's LoRA pages and weights; ``LoRASet.EMPTY`` is the base model.
        sampling: None for a prefill chunk with more to come (no logits are computed for it).
    """

    sequence_id: int
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    lora_set: LoRASet
    sampling: RowSampling | None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn for one row; ``logprob`` and ``top_logprobs`` only where asked for.

    ``token_id`` is -1 where the row's logits held a NaN: the engine fails that request alone.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class PendingStep(Protocol):
    """A launched step."""

    def wait(self) -> list[SampledToken | None]:
        """The sampled tokens, one entry per row in order; None for rows without sampling."""

    def is_done(self) -> bool:
        """Whether ``wait`` would not block: the device may have nothing to do since."""


class Runner(Protocol):
    """Executes steps: ``openlora.engine.runner.ModelRunner``, or a scripted one in benchmarks."""

    def launch(self, rows: Sequence[StepRow]) -> PendingStep:
        """Run one forward pass over ``rows`` (any mix of prefill, decode and adapters)."""
