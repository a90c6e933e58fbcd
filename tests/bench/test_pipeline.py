"""The pipeline benchmark end to end, small."""

from __future__ import annotations

import argparse
import json

import pytest

from openlora.bench import pipeline


@pytest.mark.services
def test_a_small_run_measures_everything_and_loses_no_token(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    pipeline.add_arguments(parser)
    out = tmp_path / "rows.jsonl"
    arguments = ["--streams", "4", "--tokens", "40", "--seconds", "1", "--out", str(out)]
    assert pipeline.run(parser.parse_args(arguments)) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["case"], row["streams"], row["errors"]) == ("pipeline", 4, 0)
    for field in ("relay_tok_s", "throughput_tok_s", "latency_load_tok_s"):
        assert row[field] > 0
    assert 0 <= row["latency_p50_ms"] <= row["latency_p99_ms"] < 3200
    assert set(row["cpu_share"]) == {"relay", "throughput", "latency"}
    assert {"gateway", "worker I/O", "worker engine", "client"} <= set(row["cpu_share"]["latency"])
    assert "share of bare relay" in capsys.readouterr().out
