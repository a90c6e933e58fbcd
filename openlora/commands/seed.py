"""Puts the adapters that a system starts with into the store and the registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openlora.adapters.store import AdapterStore
from openlora.errors import AdapterFailed, InvalidRequest, OpenLoRAError
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from openlora.registry.records import record_for

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A folder that was not registered, and why."""

    name: str
    reason: str


def adapter_dirs(folder: Path) -> list[Path]:
    """The subfolders of ``folder`` that hold a PEFT adapter, by name."""
    return sorted(path for path in folder.iterdir() if (path / CONFIG_FILE).is_file())


def register_dirs(
    dirs: Sequence[Path], store: AdapterStore, registry: AdapterRegistry
) -> tuple[list[AdapterRecord], list[Skipped]]:
    """Register each directory under its own name; a bad one is left out, with the reason."""
    records: list[AdapterRecord] = []
    skipped: list[Skipped] = []
    for path in dirs:
        try:
            info = store.put(path)
            records.append(registry.put(record_for(path.name, info, str(path))))
        except (AdapterFailed, InvalidRequest) as error:
            skipped.append(Skipped(path.name, _reason(error)))
    return records, skipped


def _reason(error: OpenLoRAError) -> str:
    return " ".join(error.message.split())
