"""Heartbeats and records as HTTP shows them."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.workers_view import model_fields, queue_depth, worker_fields
from openlora.protocol.status import AdapterRecord, Heartbeat, PartitionStatus


def heartbeat(**fields: Any) -> Heartbeat:
    known = {
        "id": "w",
        "pid": 1,
        "engine_pid": 2,
        "host": "h",
        "device": "cpu",
        "dtype": "float32",
        "model": "/m",
        "model_id": "tiny",
        "max_model_len": 512,
        "ready": True,
        "started_ms": 5000,
        "written_ms": 6000,
    }
    return msgspec.convert(known | fields, Heartbeat)


def test_a_worker_shows_its_partitions_with_their_lag() -> None:
    part = PartitionStatus("openlora.jobs", 3, committed=10, position=12, high_water=15)
    (shown,) = worker_fields(heartbeat(partitions=(part,)), {})["partitions"]  # type: ignore[misc]
    assert shown["lag"] == 5
    assert shown["partition"] == 3


def test_jobs_wait_at_workers_and_behind_what_was_fetched() -> None:
    unknown = PartitionStatus("openlora.jobs", 1, committed=0, position=0, high_water=-1)
    part = PartitionStatus("openlora.jobs", 3, committed=10, position=12, high_water=15)
    assert queue_depth([heartbeat(waiting=2, partitions=(part, unknown)), heartbeat()]) == 5


def test_what_takes_the_rest_keeps_nobody_waiting() -> None:
    part = PartitionStatus("openlora.batch", 3, committed=10, position=12, high_water=300)
    worker = heartbeat(waiting=130, waiting_batch=128, partitions=(part,))
    assert queue_depth([worker]) == 2


def test_models_are_each_base_once_then_the_adapters() -> None:
    record = AdapterRecord("a", 2, "f" * 64, 8, (), "tiny", 1, "/x", 7000)
    models = model_fields([heartbeat(), heartbeat(id="v", started_ms=3000)], [record])
    assert [(m["id"], m["created"]) for m in models] == [("tiny", 3), ("a", 7)]


def test_resident_adapters_are_named_where_they_may_be() -> None:
    beat = heartbeat(resident_adapters=("ab", "cd"))
    assert worker_fields(beat, {"cd": "poet"})["resident_adapters"] == ["poet"]
