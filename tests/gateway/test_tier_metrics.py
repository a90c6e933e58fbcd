"""Tiers in Prometheus' text: every number of every worker, and no adapter's name."""

from __future__ import annotations

from gateway.metrics import Metrics
from openlora.protocol.status import TierStatus
from tests.gateway.test_adapter_api import record
from tests.gateway.test_workers_view import heartbeat

SECRET = "5ec2e7" * 10


def test_each_tier_of_each_worker_has_its_numbers() -> None:
    metrics = Metrics()
    tier = TierStatus(
        "host",
        adapters=3,
        bytes_used=300,
        bytes_limit=1000,
        hits=7,
        loads=5,
        failures=2,
        evictions=4,
        load_seconds=1.5,
        load_counts=(1, 3, 1),
        load_buckets_s=(0.1, 1.0),
        contents=(SECRET,),
    )
    beats = [heartbeat(id="w1", tiers=(tier,)), heartbeat(id="w2")]
    private = record("salaries", hash=SECRET, owner="acme", visibility="private", size_bytes=50)
    metrics.tiers.update(beats, [private, record("b", size_bytes=7)])
    text = metrics.render().decode()
    labels = '{tier="host",worker="w1"}'
    for name, value in (
        ("hits_total", 7),
        ("loads_total", 5),
        ("failures_total", 2),
        ("evictions_total", 4),
        ("adapters", 3),
        ("bytes", 300),
        ("limit_bytes", 1000),
        ("load_seconds_count", 5),
        ("load_seconds_sum", 1.5),
    ):
        assert f"openlora_adapter_tier_{name}{labels} {float(value)}" in text
    assert 'load_seconds_bucket{le="1",tier="host",worker="w1"} 4.0' in text
    assert 'load_seconds_bucket{le="+Inf",tier="host",worker="w1"} 5.0' in text
    assert 'openlora_adapter_tier_adapters{tier="store",worker=""} 2.0' in text
    assert 'openlora_adapter_tier_bytes{tier="store",worker=""} 57.0' in text
    for hidden in ("salaries", SECRET, "acme"):
        assert hidden not in text


def test_a_tier_without_loads_has_an_empty_histogram() -> None:
    metrics = Metrics()
    metrics.tiers.update([heartbeat(tiers=(TierStatus("device"),))], [])
    assert 'load_seconds_count{tier="device",worker="w"} 0.0' in metrics.render().decode()
