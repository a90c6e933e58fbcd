"""The LoRA pages of one request: what a token's forward pass adds to the base model. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from openlora.adapters.extras import AdapterExtras

SITES = ("qkv", "o", "gate_up", "down")
"""The four places of a decoder layer that LoRA pages attach to, in the order they run."""

PAGE_RANK = 16
"""Rank of one page; an adapter of rank r takes ⌈r/16⌉ pages of each site it touches."""


@dataclass(frozen=True, slots=True)
class LoRASet:
    """Per site, the (page ID, weight) pairs whose weighted sum is this request's ΔW.

    A single adapter has weight 1 on its pages; an ensemble is the joined lists, exactly
    Σ weight·ΔW (PEFT's ``cat``), with nothing merged. Page IDs index the pool of their site and
    hold that site's slice of *all* layers. Hashable: equal sets share a segment of a batch.

    Attributes:
        pages: one tuple per entry of ``SITES``.
        key: names the weights' content (adapter content hashes and weights); it starts the prefix
            cache's hash chain, so that two adapters never share KV and equal content does.
        extras: what the one adapter changes beside its pages; None: nothing.
    """

    EMPTY: ClassVar[LoRASet]

    pages: tuple[tuple[tuple[int, float], ...], ...]
    key: str = ""
    extras: AdapterExtras | None = None

    @property
    def is_empty(self) -> bool:
        """True where nothing is added to the base model."""
        return not any(self.pages) and self.extras is None


LoRASet.EMPTY = LoRASet(pages=((), (), (), ()))
