"""What an engine tells about its model and its state: frozen, stdlib only."""

from __future__ import annotations

from dataclasses import dataclass

from openlora.adapters.tier_stats import TierStats


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model an engine serves.

    ``max_model_len`` is the longest prompt and output together that this engine takes, and
    ``max_lora_rank`` the largest rank of an adapter on all sites that fits its pages.
    """

    model: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    max_lora_rank: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    attention_backend: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot between two steps.

    Attributes:
        running: requests that hold KV blocks.
        waiting: requests in the queue, those not counted that wait for an adapter.
        waiting_batch: those of them with priority "batch", which no interactive one waits for.
        waiting_for_adapter: requests whose adapter is loading or has no room yet.
        num_blocks, free_blocks: KV blocks; free ones include cached ones.
        resident_adapters: names of the adapters in device pages, the longest unused first.
        steps: steps launched since the start; the counters below count from there as well.
        prompt_tokens: tokens of admitted prompts, recomputed ones included.
        cached_tokens: those of them that the prefix cache held.
        output_tokens: tokens drawn and not discarded.
        preemptions: times a request lost its blocks.
        tiers: what each tier of adapters holds and has done, the fastest first.
    """

    running: int
    waiting: int
    waiting_for_adapter: int
    num_blocks: int
    free_blocks: int
    resident_adapters: tuple[str, ...]
    steps: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    tiers: tuple[TierStats, ...] = ()
    waiting_batch: int = 0
