"""What goes into the engine and what comes out: frozen, stdlib only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from openlora.adapters.merge_spec import CAT, MergeSpec
from openlora.errors import OpenLoRAError
from openlora.sampling_params import SamplingParams

Priority = Literal["interactive", "batch"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    Attributes:
        prompt_token_ids: the tokenised prompt, at least one token.
        adapters: engine adapter name → weight; empty is the base model. Several are a weighted
            ensemble.
        merge: how several adapters become one; as it is, exactly Σ weight·ΔW (PEFT's
            ``combination_type="cat"``).
        params: how to sample.
        output_token_ids: tokens of this generation made earlier, elsewhere. They are prefilled
            behind the prompt, count towards ``max_tokens`` and penalties, and the next token gets
            index ``len(output_token_ids)`` with the noise of that index: a resumed generation
            continues its own stream.
        priority: interactive requests are scheduled before batch ones.
        tenant: whose it is; where seats are wanted by more, tenants share them.
    """

    prompt_token_ids: Sequence[int]
    adapters: Mapping[str, float] = field(default_factory=dict)
    params: SamplingParams = field(default_factory=SamplingParams)
    output_token_ids: Sequence[int] = ()
    priority: Priority = "interactive"
    merge: MergeSpec = CAT
    tenant: str = ""


class TokenOutput(NamedTuple):
    """One new token of one request, or its end without one.

    A tuple: a frozen dataclass takes four times as long to make, and each step makes one a row.

    Attributes:
        request_id: as ``Engine.add`` returned it.
        index: position in the output, from 0.
        token_id: None only where the request ended without a further token: ``error`` is set, or
            it was resumed with ``output_token_ids`` that already ended it (``finish_reason``).
        logprob: log-probability under the unfiltered distribution; None unless asked for.
        top_logprobs: (token ID, logprob) of the most likely tokens, most likely first.
        finish_reason: set on the last token: "stop" (EOS or stop string) or "length".
        error: why the request failed; it has then left the engine.
    """

    request_id: int
    index: int  # type: ignore[assignment]  # in place of the tuple's method
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: OpenLoRAError | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request of ``Engine.generate``, in the order of the requests given.

    ``token_ids`` begin with the request's ``output_token_ids``; ``logprobs`` are of the tokens
    after those. Where ``error`` is set the request failed on its way, without a finish reason.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    text: str | None = None
    logprobs: tuple[float, ...] = ()
    error: OpenLoRAError | None = None
