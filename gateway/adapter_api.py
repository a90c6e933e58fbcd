"""Registering an adapter: checked, copied into the store by content, and only then announced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from gateway.system import Gateway
from openlora.adapters.peft_format import AdapterInfo, inspect_adapter
from openlora.adapters.store import AdapterStore
from openlora.errors import AdapterFailed, InvalidRequest
from openlora.protocol.status import AdapterRecord
from openlora.registry import check_adapter_id

_READS_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_WRITES_HIDDEN = ("o_proj", "down_proj")


class NewAdapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/adapters``."""

    id: str
    source: str


async def register(gateway: Gateway, new: NewAdapter) -> AdapterRecord:
    """Validates, stores and registers ``new``; a changed adapter gets the next version.

    Raises:
        InvalidRequest: the ID is malformed, or the source is no local directory.
        AdapterFailed: the files are unusable, or fit another base model than the workers'.
        Overloaded: Redis does not answer.
    """
    check_adapter_id(new.id)
    source = _directory(new.source)
    hidden_sizes = {
        heartbeat.hidden_size
        for heartbeat in await gateway.job_log.heartbeats()
        if heartbeat.hidden_size
    }
    info = await asyncio.to_thread(_store, gateway.config.store, source, hidden_sizes)
    return await gateway.directory.put(record_of(new.id, info, new.source))


def record_of(adapter_id: str, info: AdapterInfo, source: str) -> AdapterRecord:
    """What the registry is to keep of an adapter in the store; it assigns the version."""
    return AdapterRecord(
        id=adapter_id,
        version=0,
        hash=info.hash,
        rank=info.rank,
        targets=tuple(info.targets),
        base_model=info.base_model,
        size_bytes=info.size_bytes,
        source=source,
        created_ms=time.time_ns() // 1_000_000,
    )


def record_fields(record: AdapterRecord) -> dict[str, object]:
    """A record as ``/v1/adapters`` shows it."""
    return msgspec.structs.asdict(record)


def check_hidden_size(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], hidden_sizes: set[int]
) -> None:
    """Tells an adapter of another base model before a worker has to refuse it.

    ``lora_A`` of what reads the hidden state has its size as second dimension, ``lora_B`` of what
    writes it as first. Without a worker nothing can be compared: the worker checks again.

    Raises:
        AdapterFailed: names a tensor, its shape, and the size that the workers' model has.
    """
    if not hidden_sizes:
        return
    for name, (_, shape) in sorted(tensors.items()):
        parts = name.split(".")
        hidden = None
        if "lora_A" in parts and any(part in _READS_HIDDEN for part in parts):
            hidden = shape[1]
        elif "lora_B" in parts and any(part in _WRITES_HIDDEN for part in parts):
            hidden = shape[0]
        if hidden is not None and hidden not in hidden_sizes:
            sizes = ", ".join(map(str, sorted(hidden_sizes)))
            raise AdapterFailed(
                f"{name} has shape {list(shape)}: it belongs to a model of hidden size {hidden}, "
                f"but the workers' model has {sizes}; train the adapter on the served base model"
            )


def _directory(source: str) -> Path:
    if "://" in source:
        raise InvalidRequest(
            f"source {source[:200]!r} is a URL; this build takes directories of the gateway's "
            "machine: download it there first"
        )
    if "\0" in source or not source:
        raise InvalidRequest(f"source {source[:200]!r} is no path; name a PEFT adapter's directory")
    path = Path(source).expanduser()
    if not path.is_absolute():
        raise InvalidRequest(f"source {source[:200]!r} is relative; name the whole path")
    if not path.is_dir():
        raise InvalidRequest(f"source {source[:200]!r} is no directory on the gateway's machine")
    return path


def _store(root: Path, source: Path, hidden_sizes: set[int]) -> AdapterInfo:
    check_hidden_size(inspect_adapter(source).tensors, hidden_sizes)
    try:
        return AdapterStore(root).put(source)
    except OSError as error:
        raise AdapterFailed(f"{source} cannot be copied into the store {root}: {error}") from error
