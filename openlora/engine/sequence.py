"""``Sequence``: the one mutable state of a request, owned by the engine thread."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import Enum, auto

from openlora.adapters.lora_set import LoRASet
from openlora.engine.fair_line import Place
from openlora.engine.request import Priority, Request
from openlora.sampling_params import SEED_LIMIT, SamplingParams


class Status(Enum):
    """Where a sequence is: it only moves through the scheduler."""

    WAITING = auto()
    """In the queue: new, or preempted."""
    PARKED = auto()
    """Out of the queue until its adapters are loaded, or until pages for them can be had."""
    RUNNING = auto()
    """Has blocks and pages; every step may compute some of its tokens."""
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way.

    Attributes:
        sequence_id: the engine's request ID; smaller is older.
        token_ids: prompt and output so far, as far as the host knows them.
        num_prompt_tokens: how many of them are the prompt.
        max_output_tokens: most tokens to generate: ``params.max_tokens``, or what the context has
            left.
        params, seed, priority, tenant: from the request; the seed is drawn where none was given.
        adapters: (adapter key, weight) as the adapter manager resolved them.
        status: see ``Status``.
        num_computed_tokens: positions whose KV has been launched.
        num_pending_tokens: tokens sampled by a step that was launched and not yet read (0 or 1).
        last_step: number of the newest launched step that names this sequence, 0 before any.
        block_table: KV blocks of positions 0..len·block_size-1.
        block_hashes: hash chain over the leading full blocks of ``token_ids``.
        num_hashed_blocks: leading blocks of ``block_table`` that are in the prefix cache.
        num_cached_tokens: tokens that the prefix cache saved at the last admission.
        num_preemptions: how often it lost its blocks.
        place: where it stands among those of its tenant that wait.
        lora_set: pages and weights while it runs; its key is the root of the hash chain.
        parked_at_step: since when it has been waiting for adapter pages; -1: it is not.
        turn_began_step: since when it has run without a pause.
        paused_at_step: since when it has made way for others' adapters, with its seat and blocks
            but without pages; -1: it has not.
    """

    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_output_tokens: int
    params: SamplingParams
    seed: int
    priority: Priority = "interactive"
    tenant: str = ""
    adapters: tuple[tuple[str, float], ...] = ()
    status: Status = Status.WAITING
    num_computed_tokens: int = 0  # set by the scheduler
    num_pending_tokens: int = 0  # set by the engine
    last_step: int = 0  # set by the engine
    block_table: list[int] = field(default_factory=list)  # set by the block manager
    block_hashes: list[bytes] = field(default_factory=list)  # set by the block manager
    num_hashed_blocks: int = 0  # set by the block manager
    num_cached_tokens: int = 0  # set by the block manager
    num_preemptions: int = 0  # set by the scheduler
    place: Place | None = None  # set by the queue
    lora_set: LoRASet = LoRASet.EMPTY  # set by the scheduler
    parked_at_step: int = -1  # set by the scheduler
    turn_began_step: int = 0  # set by the scheduler
    paused_at_step: int = -1  # set by the scheduler

    @classmethod
    def of_request(
        cls,
        sequence_id: int,
        request: Request,
        adapters: tuple[tuple[str, float], ...],
        max_model_len: int,
    ) -> Sequence:
        """A new sequence; a missing seed is drawn."""
        num_prompt_tokens, params = len(request.prompt_token_ids), request.params
        return cls(
            sequence_id=sequence_id,
            token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            num_prompt_tokens=num_prompt_tokens,
            max_output_tokens=min(params.max_tokens, max_model_len - num_prompt_tokens),
            params=params,
            seed=params.seed if params.seed is not None else secrets.randbelow(SEED_LIMIT),
            priority=request.priority,
            tenant=request.tenant,
            adapters=adapters,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, those included that the host has not read yet."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV has not been launched: 1 in decode, more in prefill."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated and known to the host."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_ready(self) -> bool:
        """Whether its next tokens can be launched.

        A token that the host has not read can feed the next step on the device, unless it is the
        last one anyway or the penalties, which count on the host, need it.
        """
        if not self.num_pending_tokens:
            return True
        num_output_tokens = self.num_output_tokens + self.num_pending_tokens
        return num_output_tokens < self.max_output_tokens and not self.params.has_penalties
