"""The soak, short, and what it makes of its samples."""

from __future__ import annotations

import argparse
import json

import pytest

from openlora.bench import soak


@pytest.mark.long
@pytest.mark.services
def test_a_short_soak_measures_every_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "SAMPLE_S", 0.2)
    parser = argparse.ArgumentParser()
    soak.add_arguments(parser)
    out = tmp_path / "rows.jsonl"
    arguments = ["--minutes", "0.05", "--streams", "4", "--tokens", "20", "--load", "200"]
    # So short a run is a warm-up alone: any growth is allowed.
    arguments += ["--bound", "1e9", "--out", str(out)]
    assert soak.run(parser.parse_args(arguments)) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["case"], row["errors"]) == ("soak", 0)
    # Less where a stream waits for the first token of its next request.
    assert row["tok_s"] == pytest.approx(200, rel=0.4)
    processes = {memory["process"] for memory in row["memory"]}
    parts = {"gateway", "worker I/O", "worker engine", "broker", "redis"}
    assert processes == parts | {soak.REDIS_DATA}
    assert all(0.5 < memory["first_mb"] <= memory["most_mb"] for memory in row["memory"])
    assert "keeps all messages" in capsys.readouterr().out


def test_growth_behind_the_warm_up_is_found_and_the_broker_may_grow():
    def size(at, per_hour):
        return 100 + max(0, 300 - at) + per_hour * at / 3600

    samples = [
        (at, {"gateway": size(at, 65), "redis": size(at, 63), "broker": size(at, 1000)})
        for at in range(301, 1000, 10)
    ]
    gateway, redis, broker = soak.trends(samples, bound=64)
    assert (gateway.grows, redis.grows, broker.grows) == (True, False, False)
    assert gateway.slope_mb_per_hour == pytest.approx(65, abs=0.1)
    assert broker.last_mb > broker.first_mb


def test_what_a_start_takes_is_no_growth():
    samples = [(at, {"gateway": min(200.0, 2.0 * at)}) for at in range(0, 600, 10)]
    (gateway,) = soak.trends(samples, bound=1)
    assert (gateway.first_mb, gateway.last_mb, gateway.grows) == (200, 200, False)
