"""The LoRA sets of requests whose adapters are in pages."""

from __future__ import annotations

from collections.abc import Iterable

from openlora.adapters.extras_combined import CombinedExtras
from openlora.adapters.lora_set import LoRASet
from openlora.adapters.pages import join_lora_set
from openlora.engine.adapter_entry import Adapter
from openlora.engine.residency import ResidentAdapters


class LoRASets:
    """Joins what ``resident`` holds."""

    def __init__(self, resident: ResidentAdapters) -> None:
        self._resident = resident
        self._combined = CombinedExtras()

    def join(self, adapters: Iterable[tuple[Adapter, float]]) -> LoRASet:
        """Σ weight · ΔW of adapters that are resident, extras included.

        Sorted by content, so that equal ensembles are one set however they were written down.
        """
        parts = sorted((adapter.content, weight, adapter.key) for adapter, weight in adapters)
        name = "+".join(f"{weight!r}*{content}" for content, weight, _ in parts)
        extras = [(self._resident.extras(key), weight) for _, weight, key in parts]
        return join_lora_set(
            [(self._resident.pages(key), weight) for _, weight, key in parts],
            key=name,
            extras=self._combined.of(name, [(e, weight) for e, weight in extras if e is not None]),
        )
