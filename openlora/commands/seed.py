"""Puts the adapters that a system starts with into the store and the registry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.registration import STORING_MS, check_hidden_size, record_of
from openlora.adapters.peft_format import AdapterLayout
from openlora.adapters.stores import Store
from openlora.errors import AdapterFailed, Forbidden, InvalidRequest, OpenLoRAError, SetupError
from openlora.registry import AdapterRegistry, check_adapter_id

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A folder that was not registered, and why."""

    name: str
    reason: str


def adapter_dirs(folder: Path) -> list[Path]:
    """The subfolders of ``folder`` that hold a PEFT adapter, by name."""
    return sorted(path for path in folder.iterdir() if (path / CONFIG_FILE).is_file())


def hidden_size_of(model: str) -> set[int]:
    """The hidden size that a model directory's configuration names; empty where it has none."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return set()
    try:
        return {int(json.loads(path.read_text(encoding="utf-8"))["hidden_size"])}
    except (ValueError, KeyError, TypeError):
        return set()


def register_dirs(
    dirs: Sequence[Path],
    store: Store,
    registry: AdapterRegistry,
    hidden_sizes: set[int],
) -> list[Skipped]:
    """Register each directory under its own name; a bad one is left out, with the reason.

    ``hidden_sizes``: of the served model, to tell an adapter of another base; empty: not checked.

    Raises:
        SetupError: an adapter cannot be copied into the store.
    """

    def check(layout: AdapterLayout) -> None:
        check_hidden_size(layout.tensors, hidden_sizes)

    skipped: list[Skipped] = []
    holder = registry.holder()
    for path in dirs:
        try:
            check_adapter_id(path.name)
            info = store.put(
                path,
                holder=holder,
                check=check,
                announce=lambda content_hash: registry.expect(content_hash, STORING_MS),
            )
            registry.expect(info.hash)
            registry.put(record_of(path.name, info, str(path.resolve())))
        except (AdapterFailed, Forbidden, InvalidRequest) as error:
            skipped.append(Skipped(path.name, _reason(error)))
        except OSError as error:
            raise SetupError(
                f"adapter {path.name} cannot be copied into the adapter store: {error}; free space "
                "there, or set OPENLORA_STORE to a folder that can be written"
            ) from error
    return skipped


def _reason(error: OpenLoRAError) -> str:
    return " ".join(error.message.split())
