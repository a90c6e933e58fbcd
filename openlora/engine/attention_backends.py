"""Which attention an engine on a GPU uses: this project's Triton kernels, or a library's.

flash-attn is imported only where it is going to be used, and its absence or its fault is a line in
the log and in `openlora doctor`, or, where it was asked for by name, an error of the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from openlora.engine.attention_libraries import (
    LIBRARIES,
    AttentionNeeds,
    Library,
    LibraryBroken,
)
from openlora.engine.config import EngineConfig
from openlora.errors import SetupError
from openlora.kernels.flash_attention import FlashAttention

if TYPE_CHECKING:
    from openlora.models.config import ModelConfig

TRITON = "triton"


@dataclass(frozen=True, slots=True)
class Order:
    """Backends by speed, the fastest first; the first that can be used is.

    ``library_from``: the least work of a step's chunks, the sum of tokens · context, for which a
    library that comes before Triton in ``prefill`` computes them; Triton computes smaller ones.
    """

    prefill: tuple[str, ...] = (TRITON,)
    decode: tuple[str, ...] = (TRITON,)
    library_from: int = 0


PREFERRED: Mapping[tuple[int, int], Order] = {
    (9, 128): Order(prefill=("flash-attn-4", TRITON), library_from=16 << 20),
}
"""What "auto" takes, by the GPU's major compute capability and the size of a head; Triton for all
others, and for soft caps.

From `openlora bench attention` (tests/bench/results/attention_8b_h200.jsonl and NOTES.md,
"Attention backends"): an entry names a library only where it was measured to be faster. On an H200,
a layer of the 8B shape, Triton beside flash-attn-4 4.0.0b36: one prompt of 8,192 tokens (work 67
million) takes 1,720 and 986 µs, 64 of 128 (1 million) 105 and 119 µs, of the host's time 110 and
310 µs. With 11 µs won a million and 200 µs lost, the GPU wins what the host loses from about 17
million on: a prompt of 4,096 tokens, or four of 2,048.
"""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """What computes attention.

    Attributes:
        prefill, decode: the library; None: the Triton kernels.
        library_from: see ``Order``.
        remarks: of each library that is installed and not used, why.
    """

    prefill: FlashAttention | None = None
    decode: FlashAttention | None = None
    library_from: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For logs and model info: one name, or one of each phase."""
        prefill, decode = (
            TRITON if library is None else library.name for library in (self.prefill, self.decode)
        )
        if self.prefill is not None and self.library_from:
            return f"prefill {prefill} for long prompts, {TRITON} otherwise; decode {decode}"
        return prefill if prefill == decode else f"prefill {prefill}, decode {decode}"


TRITON_ATTENTION = AttentionChoice()


def attention_for(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> AttentionChoice:
    """``choose_attention`` for an engine on the current CUDA device."""
    if config.deterministic:
        # A library's sums go by the shapes of a step.
        return TRITON_ATTENTION
    capability = torch.cuda.get_device_capability()
    needs = AttentionNeeds.of(model, dtype, config.block_size, capability)
    return choose_attention(config.attention_backend, needs)


def choose_attention(setting: str, needs: AttentionNeeds) -> AttentionChoice:
    """Which backend computes what.

    Args:
        setting: ``EngineConfig.attention_backend``. A library's name takes it for all; "auto" takes
            what is fastest of what can be used.

    Raises:
        SetupError: the library that was asked for cannot be used: why, and what to change.
    """
    if setting == TRITON:
        return TRITON_ATTENTION
    for library in LIBRARIES:
        if library.name == setting:
            flash = _named(library, needs)
            return AttentionChoice(flash, flash)
    return _fastest(needs)


def _named(library: Library, needs: AttentionNeeds) -> FlashAttention:
    reason = library.why_not(needs)
    if reason is None:
        try:
            return library.load()
        except LibraryBroken as broken:
            reason = str(broken)
    raise SetupError(
        f"attention_backend is {library.name!r}, but {reason}; or set attention_backend to 'auto'"
    )


def _fastest(needs: AttentionNeeds) -> AttentionChoice:
    order = PREFERRED.get((needs.capability[0], needs.head_dim), Order())
    if needs.soft_cap:
        order = Order()
    usable: dict[str, FlashAttention | None] = {TRITON: None}
    remarks = []
    for library in LIBRARIES:
        version = library.version()
        if version is None:
            continue
        reason = library.why_not(needs)
        if reason is None and library.name not in {*order.prefill, *order.decode}:
            reason = (
                "it was not measured to be faster on compute "
                f"{needs.capability[0]}.{needs.capability[1]} for such a model; attention_backend "
                f"{library.name!r} takes it"
            )
        if reason is None:
            try:
                usable[library.name] = library.load()
                continue
            except LibraryBroken as broken:
                reason = str(broken)
        remarks.append(f"{library.name} {version} found, not used: {reason}")
    prefill, decode = (
        next((usable[name] for name in names if name in usable), None)
        for names in (order.prefill, order.decode)
    )
    return AttentionChoice(prefill, decode, order.library_from, tuple(remarks))
