"""Hop 1, the request: what a client may ask → ``JobDraft`` → ``Job``. Pure.

Websocket frames and HTTP bodies both become a ``GenerateRequest``; everything after that is here
once, whatever door the request came through.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

import msgspec

from openlora.errors import InvalidRequest
from openlora.protocol.codec import encode
from openlora.protocol.jobs import (
    MAJORITY_SIGNS,
    MERGE_METHODS,
    AdapterRef,
    Job,
    Merge,
    Message,
    Priority,
)
from openlora.protocol.requests import (
    MAX_ADAPTERS,
    MAX_MESSAGES,
    MAX_WEIGHT,
    ROLES,
    AdapterChoice,
)
from openlora.registry.records import check_reference
from openlora.sampling_params import SEED_LIMIT, SamplingParams

MAX_DEADLINE_S = 86_400.0
MAX_IDEMPOTENCY_KEY_CHARS = 256


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``SamplingParams`` on the wire: the same fields, and unknown ones are refused."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = 0


class GenerateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of a request as the client sent them; types are checked, meaning not yet."""

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    adapter: str | None = None
    adapters: tuple[AdapterChoice, ...] | None = None
    merge: Merge = Merge()
    params: Params = Params()
    priority: Priority = "interactive"
    deadline_s: float | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class JobDraft:
    """A checked request that still lacks what only the running system knows.

    Attributes:
        adapters: by ID, not yet resolved to versions.
        params: the seed may be None; ``job_of`` takes one.
        digest: SHA-256 over everything asked for, to tell a repeated idempotency key's body.
    """

    prompt: str | None
    messages: tuple[Message, ...] | None
    adapters: tuple[AdapterChoice, ...]
    merge: Merge
    params: SamplingParams
    priority: Priority
    deadline_s: float | None
    idempotency_key: str | None
    digest: str


def draft_of(request: GenerateRequest) -> JobDraft:
    """Checks the meaning of ``request``.

    Raises:
        InvalidRequest: names the field, its value and what to send instead.
    """
    _check_input(request)
    _check_merge(request.merge)
    _check_deadline(request.deadline_s)
    key = request.idempotency_key
    if key is not None and not 0 < len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidRequest(
            f"idempotency_key has {len(key)} characters; send 1 to {MAX_IDEMPOTENCY_KEY_CHARS}"
        )
    adapters = _adapters_of(request)
    params = SamplingParams(**msgspec.structs.asdict(request.params))
    asked = (
        request.prompt,
        request.messages,
        adapters,
        request.merge,
        request.params,
        request.priority,
        request.deadline_s,
    )
    return JobDraft(
        prompt=request.prompt,
        messages=request.messages,
        adapters=adapters,
        merge=request.merge,
        params=params,
        priority=request.priority,
        deadline_s=request.deadline_s,
        idempotency_key=key,
        digest=hashlib.sha256(encode(asked)).hexdigest(),
    )


def job_of(
    draft: JobDraft,
    *,
    job_id: str,
    tenant: str,
    created_ms: int,
    seed: int,
    adapters: tuple[AdapterRef, ...],
) -> Job:
    """The job of ``draft``: adapters resolved, deadline absolute, ``seed`` for a missing one.

    An interactive job is leased: it is cancelled when nobody watches it for the grace time.
    """
    params = draft.params
    if params.seed is None:
        params = dataclasses.replace(params, seed=seed)
    deadline_ms = None if draft.deadline_s is None else created_ms + round(draft.deadline_s * 1000)
    return Job(
        job_id=job_id,
        tenant=tenant,
        created_ms=created_ms,
        params=params,
        prompt=draft.prompt,
        messages=draft.messages,
        adapters=adapters,
        merge=draft.merge,
        priority=draft.priority,
        deadline_ms=deadline_ms,
        leased=draft.priority == "interactive",
    )


def _check_input(request: GenerateRequest) -> None:
    if (request.prompt is None) == (request.messages is None):
        both = request.prompt is not None
        raise InvalidRequest(
            f"{'both' if both else 'neither'} of messages and prompt given; send exactly one"
        )
    if request.prompt is not None:
        if not request.prompt:
            raise InvalidRequest("prompt is empty; send at least one character")
        return
    messages = request.messages or ()
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(messages)} entries; send 1 to {MAX_MESSAGES}")
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"messages[{number}].role is {message.role[:64]!r}; use one of {', '.join(ROLES)}"
            )
        # an assistant may have answered nothing, and a client sends that back as it was
        if not message.content and message.role != "assistant":
            raise InvalidRequest(f"messages[{number}].content is empty; send some text")


def _check_merge(merge: Merge) -> None:
    if merge.method not in MERGE_METHODS:
        raise InvalidRequest(
            f"merge.method is {merge.method[:64]!r}; use one of {', '.join(MERGE_METHODS)}"
        )
    prunes, random = "prune" in merge.method, "dare" in merge.method
    elects = "ties" in merge.method
    if merge.majority_sign not in MAJORITY_SIGNS:
        raise InvalidRequest(
            f"merge.majority_sign is {merge.majority_sign[:64]!r}; use 'total' or 'frequency'"
        )
    if merge.density is None and (prunes or random or elects):
        raise InvalidRequest(
            f"merge.method {merge.method!r} needs a density: the share of values to keep, in (0, 1]"
        )
    if merge.density is not None and not 0 < merge.density <= 1:
        raise InvalidRequest(f"merge.density is {merge.density}; it must be in (0, 1]")
    if not 0 <= merge.seed < SEED_LIMIT:
        raise InvalidRequest(f"merge.seed is {merge.seed}; it must be in [0, {SEED_LIMIT})")
    unused = [
        name
        for name, used, default in (
            ("density", prunes or random or elects, None),
            ("majority_sign", elects, "total"),
            ("seed", random, 0),
        )
        if not used and getattr(merge, name) != default
    ]
    if unused:
        raise InvalidRequest(
            f"merge has {' and '.join(unused)} set, which {merge.method!r} does not use; "
            "leave it out"
        )


def _check_deadline(deadline_s: float | None) -> None:
    if deadline_s is not None and not 0 < deadline_s <= MAX_DEADLINE_S:
        raise InvalidRequest(
            f"deadline_s is {deadline_s}; it must be in (0, {MAX_DEADLINE_S:g}] seconds"
        )


def _adapters_of(request: GenerateRequest) -> tuple[AdapterChoice, ...]:
    if request.adapter is not None:
        if request.adapters is not None:
            raise InvalidRequest("both of adapter and adapters given; send one of them")
        return (AdapterChoice(check_reference(request.adapter)),)
    adapters = request.adapters or ()
    if len(adapters) > MAX_ADAPTERS:
        raise InvalidRequest(f"adapters has {len(adapters)} entries; send at most {MAX_ADAPTERS}")
    seen: set[str] = set()
    for number, adapter in enumerate(adapters):
        check_reference(adapter.id)
        if adapter.id in seen:
            raise InvalidRequest(
                f"adapters names {adapter.id!r} twice; name each once and add the weights up"
            )
        seen.add(adapter.id)
        if not math.isfinite(adapter.weight) or abs(adapter.weight) > MAX_WEIGHT:
            raise InvalidRequest(
                f"adapters[{number}].weight is {adapter.weight}; it must be a finite number in "
                f"[{-MAX_WEIGHT:g}, {MAX_WEIGHT:g}]"
            )
    return adapters
