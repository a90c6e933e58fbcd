"""What the I/O process and the engine process say to each other: frozen, arrays on the wire.

One frame carries everything there is to say at that moment: all commands that have gathered, or
all tokens of an engine step. A ``ticket`` is the I/O process's number for one run of one job; it
is never used twice, so a late token of an aborted run cannot be taken for another's.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from openlora.errors import PromptTooLong
from openlora.protocol.jobs import AdapterRef, Merge
from openlora.protocol.status import TierStatus
from openlora.sampling_params import SamplingParams


class EngineSetup(msgspec.Struct, frozen=True, array_like=True):
    """The first frame to the engine process. ``kind``: "model", "scripted:RATE", "clock:RATE".

    ``merge_dir``: the directory that keeps merged adapters. ``adapter_store``: URL of a store whose
    adapters are kept in ``adapter_disk_dir``, up to ``adapter_disk_bytes``; None: all are local.
    """

    kind: str
    model: str
    device: str
    dtype: str
    log_level: str
    merge_dir: str | None = None
    adapter_store: str | None = None
    adapter_disk_dir: str | None = None
    adapter_disk_bytes: int = 1 << 30
    attention_backend: str = "auto"
    deterministic: bool = False
    max_graph_tokens: int = 0


class ModelFacts(msgspec.Struct, frozen=True, array_like=True, tag="facts"):
    """The model is loaded and steps can run."""

    pid: int
    device: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    hidden_size: int
    max_lora_rank: int
    attention_backend: str
    max_num_seqs: int = 64

    def check_length(self, prompt_tokens: int) -> None:
        """Raises PromptTooLong where so many tokens leave no room for an answer."""
        if prompt_tokens >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {prompt_tokens} tokens and the model's context holds "
                f"{self.max_model_len}; shorten it"
            )


class LoadProgress(msgspec.Struct, frozen=True, array_like=True, tag="loading"):
    """Before the facts, now and then: the share of the model that is loaded, 0 to 1."""

    share: float


class SetupFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """In place of the facts where the engine cannot start; ``message`` is for the operator."""

    message: str


class Start(msgspec.Struct, frozen=True, array_like=True):
    """Run one job. ``adapters`` are (content hash, weight); the hashes were registered before."""

    ticket: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapters: tuple[tuple[str, float], ...] = ()
    output_token_ids: tuple[int, ...] = ()
    priority: str = "interactive"
    merge: Merge = Merge()
    tenant: str = ""


def weights_of(adapters: Iterable[AdapterRef]) -> tuple[tuple[str, float], ...]:
    """(content hash, weight); two adapters of equal content are one with the sum of weights."""
    weights: dict[str, float] = {}
    for adapter in adapters:
        weights[adapter.hash] = weights.get(adapter.hash, 0.0) + adapter.weight
    return tuple(weights.items())


class Commands(msgspec.Struct, frozen=True, array_like=True):
    """Everything the engine is asked at once; applied in the order of the fields.

    ``register``: (content hash, directory) of adapters that ``start`` and ``pin`` may name.
    ``pin``: content hashes to keep in pages from now on, these and no others; None: as before.
    """

    register: tuple[tuple[str, str], ...] = ()
    start: tuple[Start, ...] = ()
    abort: tuple[int, ...] = ()
    pin: tuple[str, ...] | None = None


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """Why a run ended in the engine: an error of the tree, by its code."""

    code: str
    message: str


class Output(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """One new token of one run, or its end without one (``fault``)."""

    ticket: int
    index: int
    token_id: int | None
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    fault: Fault | None = None


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How busy the engine is; goes with a step's outputs about twice a second.

    ``waiting_batch``: of those that wait, what no interactive job waits for.
    """

    running: int
    waiting: int
    resident_adapters: tuple[str, ...]
    tiers: tuple[TierStatus, ...] = ()
    waiting_batch: int = 0


class StepOutputs(msgspec.Struct, frozen=True, array_like=True):
    """All tokens of one engine step."""

    outputs: tuple[Output, ...] = ()
    load: Load | None = None
