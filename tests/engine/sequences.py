"""Sequences for tests of the pure parts."""

from __future__ import annotations

from openlora.adapters.lora_set import LoRASet
from openlora.engine.sequence import Sequence
from openlora.sampling_params import SamplingParams


def make_sequence(
    sequence_id: int,
    token_ids: list[int],
    *,
    key: str = "",
    max_tokens: int = 8,
    priority: str = "interactive",
    adapters: tuple[tuple[str, float], ...] = (),
) -> Sequence:
    """A new sequence, all of whose tokens are its prompt."""
    sequence = Sequence(
        sequence_id=sequence_id,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        max_output_tokens=max_tokens,
        params=SamplingParams(max_tokens=max_tokens, temperature=0),
        seed=0,
        priority=priority,
        adapters=adapters,
    )
    sequence.lora_set = LoRASet(pages=((), (), (), ()), key=key)
    return sequence
