"""What a request must be before the engine takes it. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from openlora.adapters.extra_format import MAX_ADDED_TOKENS
from openlora.engine.request import Priority, Request
from openlora.engine.stats import ModelInfo
from openlora.errors import InvalidRequest, PromptTooLong


def check_request(request: Request, model: ModelInfo) -> None:
    """Check a request against the model's limits.

    Raises:
        InvalidRequest: empty prompt, bad token ID, bad weight or merge, unknown priority.
        PromptTooLong: no room for one new token.
    """
    num_prompt, limit = len(request.prompt_token_ids), model.max_model_len
    if num_prompt == 0:
        raise InvalidRequest("prompt_token_ids is empty; send at least one token")
    if num_prompt >= limit:
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens; this engine takes {limit} with the answer, "
            f"so send at most {limit - 1}"
        )
    if num_prompt + len(request.output_token_ids) > limit:
        raise InvalidRequest(
            f"prompt and output_token_ids have {num_prompt} + {len(request.output_token_ids)} "
            f"tokens; this engine takes {limit} together"
        )
    # An adapter may have tokens of its own; how many is known once it is loaded.
    vocab_size = model.vocab_size + (MAX_ADDED_TOKENS if request.adapters else 0)
    _check_token_ids("prompt_token_ids", request.prompt_token_ids, vocab_size)
    _check_token_ids("output_token_ids", request.output_token_ids, vocab_size)
    for name, weight in request.adapters.items():
        if not math.isfinite(weight):
            raise InvalidRequest(f"adapter {name!r} has weight {weight}; weights must be finite")
    request.merge.check()
    if request.priority not in get_args(Priority):
        raise InvalidRequest(
            f"priority is {request.priority!r}; choose one of {', '.join(get_args(Priority))}"
        )


def _check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for position, token_id in enumerate(token_ids):
        if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{name}[{position}] is {token_id!r}; token IDs of this model are integers "
                f"from 0 to {vocab_size - 1}"
            )
