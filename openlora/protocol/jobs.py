"""``Job``: one accepted request, as it is stored in Redis and queued in Kafka. Frozen."""

from __future__ import annotations

from typing import Literal

import msgspec

from openlora.sampling_params import SamplingParams

Priority = Literal["interactive", "batch"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One chat message."""

    role: str
    content: str


class AdapterRef(msgspec.Struct, frozen=True):
    """An adapter as resolved when the job was accepted: a version and a content, never "newest".

    ``hash`` is the SHA-256 of the adapter's content: the name under which workers find and keep
    it, so that a job never sees a mix of two versions.
    """

    id: str
    version: int
    hash: str
    weight: float = 1.0


MERGE_METHODS = (
    *("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties"),
    *("dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"),
)
MAJORITY_SIGNS = ("total", "frequency")


class Merge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How several adapters become one: the combination types of PEFT's ``add_weighted_adapter``.

    "cat" is exactly Σ weight·ΔW. ``density`` is the share of values that pruning methods keep,
    ``majority_sign`` how ties methods elect a sign, ``seed`` what dare methods draw from.
    """

    method: str = "cat"
    density: float | None = None
    majority_sign: str = "total"
    seed: int = 0


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything a worker needs to run a request, on any machine, at any later time.

    Exactly one of ``prompt`` and ``messages`` is set. ``params.seed`` is always set (the gateway
    draws a missing one). Times are Unix milliseconds; ``deadline_ms`` is absolute.
    ``leased``: a client watches, so the job is cancelled when nobody renews its lease.
    """

    job_id: str
    tenant: str
    created_ms: int
    params: SamplingParams
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    adapters: tuple[AdapterRef, ...] = ()
    merge: Merge = Merge()
    priority: Priority = "interactive"
    deadline_ms: int | None = None
    leased: bool = True
