"""The pipeline benchmark end to end, small."""

from __future__ import annotations

import argparse
import json

import pytest

from openlora.bench import pipeline
from openlora.bench.pipeline_plan import ClientResult, Spread
from openlora.bench.pipeline_runs import Measured


@pytest.mark.long
@pytest.mark.services
def test_a_small_run_measures_everything_and_loses_no_token(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    pipeline.add_arguments(parser)
    out = tmp_path / "rows.jsonl"
    arguments = ["--streams", "4", "--tokens", "40", "--seconds", "1", "--loads", "200"]
    assert pipeline.run(parser.parse_args([*arguments, "--out", str(out)])) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["case"], row["streams"], row["errors"]) == ("pipeline", 4, 0)
    latency = row["latency"]
    for figure in (row["relay_tok_s"], row["throughput_tok_s"], latency["tok_s"]):
        assert figure > 0
    assert 0 <= latency["latency_p50_ms"] <= latency["latency_p99_ms"] < 3200
    assert latency["offered_tok_s"] == pytest.approx(row["throughput_tok_s"] / 2, abs=1)
    goal = row["goal_latency"]["offered_tok_s"]
    assert goal == pytest.approx(0.3 * row["relay_tok_s"], abs=1)
    assert set(row["cpu_share"]) == set(pipeline.RUNS)
    assert {"gateway", "worker I/O", "worker engine", "client"} <= set(latency["cpu_us_per_token"])
    loads = row["loads"]
    assert [load["path"] for load in loads] == ["relay", "whole"]
    # Less where a stream waits for the first token of its next request.
    assert all(load["tok_s"] == pytest.approx(200, rel=0.3) for load in loads)
    printed = capsys.readouterr().out
    assert "share of bare relay" in printed
    assert "kept up" in printed


def test_a_load_is_kept_up_with_where_it_comes_in_time():
    def measured(tokens, p99_ms, errors=()):
        spread = Spread(1, 1.0, p99_ms)
        result = ClientResult(tokens, 1.0, 0.5, 1, spread, spread, list(errors))
        return Measured(result, {"client": 0.5})

    def kept_up(*facts):
        return pipeline.load_row("whole", 1000, measured(*facts)).kept_up

    assert kept_up(955, 99.0)
    assert not kept_up(945, 1.0)
    assert not kept_up(1000, 101.0)
    assert not kept_up(1000, 1.0, ["closed"])
    assert pipeline.load_row("whole", 1000, measured(1000, 1.0)).cpu_us_per_token["client"] == 500
