"""Heartbeats and adapter records as HTTP shows them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from openlora.protocol.names import BATCH_TOPIC
from openlora.protocol.status import AdapterRecord, Heartbeat


def worker_fields(heartbeat: Heartbeat, ids: Mapping[str, str]) -> dict[str, object]:
    """One worker of ``/v1/workers``. ``ids``: content hash → ID of the adapters to be named."""
    return {
        "id": heartbeat.id,
        "pid": heartbeat.pid,
        "engine_pid": heartbeat.engine_pid,
        "host": heartbeat.host,
        "device": heartbeat.device,
        "dtype": heartbeat.dtype,
        "model": heartbeat.model_id,
        "max_model_len": heartbeat.max_model_len,
        "attention_backend": heartbeat.attention_backend,
        "ready": heartbeat.ready,
        "loaded": heartbeat.loaded,
        "started_ms": heartbeat.started_ms,
        "written_ms": heartbeat.written_ms,
        "partitions": [
            {
                "topic": part.topic,
                "partition": part.partition,
                "committed": part.committed,
                "position": part.position,
                "high_water": part.high_water,
                "lag": max(0, part.high_water - part.committed),
                "paused": part.paused,
            }
            for part in heartbeat.partitions
        ],
        "running": heartbeat.running,
        "waiting": heartbeat.waiting,
        "resident_adapters": [
            ids[content] for content in heartbeat.resident_adapters if content in ids
        ],
        "tiers": [
            {
                "tier": tier.tier,
                "adapters": [ids[content] for content in tier.contents if content in ids],
                "count": tier.adapters,
                "bytes_used": tier.bytes_used,
                "bytes_limit": tier.bytes_limit,
                "hits": tier.hits,
                "loads": tier.loads,
                "failures": tier.failures,
                "evictions": tier.evictions,
                "load_seconds": tier.load_seconds,
            }
            for tier in heartbeat.tiers
        ],
        "tokens_per_s": heartbeat.tokens_per_s,
    }


def model_fields(
    heartbeats: Iterable[Heartbeat], records: Iterable[AdapterRecord]
) -> list[dict[str, object]]:
    """``/v1/models``: base models first (oldest worker's start as ``created``), then adapters."""
    started_ms: dict[str, int] = {}
    for heartbeat in heartbeats:
        known = started_ms.get(heartbeat.model_id, heartbeat.started_ms)
        started_ms[heartbeat.model_id] = min(known, heartbeat.started_ms)
    models: list[dict[str, object]] = [
        {"id": model, "object": "model", "created": created // 1000, "owned_by": "openlora"}
        for model, created in sorted(started_ms.items())
    ]
    models += [
        {
            "id": record.id,
            "object": "model",
            "created": record.created_ms // 1000,
            "owned_by": "openlora",
            "parent": record.base_model,
            "version": record.version,
        }
        for record in records
    ]
    return models


def queue_depth(heartbeats: Sequence[Heartbeat]) -> int:
    """Jobs that no engine works on yet: waiting at workers, or in partitions behind them. What has
    priority "batch" is none of them: it takes what they leave, and they do not wait for it."""
    fetched = sum(heartbeat.waiting - heartbeat.waiting_batch for heartbeat in heartbeats)
    behind = sum(
        max(0, part.high_water - part.position)
        for heartbeat in heartbeats
        for part in heartbeat.partitions
        if part.topic != BATCH_TOPIC
    )
    return fetched + behind
