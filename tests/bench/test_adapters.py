"""The adapter benchmark on a tiny model: its rows, and how adapters are drawn."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from openlora.bench import adapters
from openlora.bench.adapter_traffic import draw
from openlora.errors import SetupError
from tests.engine.tiny_model import make_tiny_model


def run(*words):
    parser = argparse.ArgumentParser()
    adapters.add_arguments(parser)
    return adapters.run(parser.parse_args([*words]))


def test_a_row_for_each_case(tmp_path, capsys):
    make_tiny_model(tmp_path / "model")
    small = ("--requests", "6", "--concurrency", "2", "--prompt", "5", "--output", "3")
    where = ("--model", str(tmp_path / "model"), "--out", str(tmp_path / "rows"))
    what = ("--adapters", "9,2", "--popularity", "zipf,distinct", "--rank", "4,mixed")
    assert run(*where, *what, *small, "--room", "2", "--rounds", "2") == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["rank"], row["adapters"], row["popularity"]) for row in rows] == [
        (rank, count, popularity)
        for rank in ("4", "mixed")
        for popularity in ("zipf", "distinct")
        for count in (2, 9)
    ]
    for row in rows:
        assert row["out_tok_s"] > 0
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert row["of_all_fit"] > 0
        assert row["ttft_of_all_fit"] > 0
        assert 0 < row["distinct_a_step"] <= 2
        assert row["placed"] >= (1 if row["adapters"] == 9 else 0)
    assert [row["distinct"] for row in rows if row["popularity"] == "distinct"] == [2, 6, 2, 6]


def test_adapters_that_fit_neither_memory_nor_disk(tmp_path, capsys):
    make_tiny_model(tmp_path / "model")
    small = ("--requests", "12", "--concurrency", "3", "--seats", "2", "--prompt", "5")
    where = ("--model", str(tmp_path / "model"), "--out", str(tmp_path / "rows"))
    what = ("--adapters", "12", "--popularity", "distinct", "--rank", "96", "--output", "3")
    assert run(*where, *what, *small, "--room", "2", "--host-mib", "1", "--disk-mib", "1") == 0
    (row,) = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert row["distinct"] == 12
    assert row["fetched"] >= 6


def test_no_case_begins_behind_the_limit(tmp_path, capsys):
    make_tiny_model(tmp_path / "model")
    where = ("--model", str(tmp_path / "model"), "--out", str(tmp_path / "rows"))
    assert run(*where, "--adapters", "1,2", "--rank", "4", "--limit-s", "0") == 0
    assert not (tmp_path / "rows").exists()
    assert capsys.readouterr().err.count("left out, --limit-s is over") == 2


def test_rows_are_there_before_the_run_is_over(tmp_path, capsys, monkeypatch):
    make_tiny_model(tmp_path / "model")
    where = ("--model", str(tmp_path / "model"), "--out", str(tmp_path / "rows"))
    small = ("--rank", "4", "--requests", "2", "--prompt", "5", "--output", "3")
    measured, calls = adapters.measure, []

    def ends_in_the_fourth(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(adapters, "measure", ends_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(*where, *small, "--adapters", "1,2", "--rounds", "2")
    (row,) = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert (row["adapters"], row["requests"]) == (1, 4)
    said = capsys.readouterr().err
    assert "3 of 4, round 1, 1 zipf: " in said


ON_A_BARE_MACHINE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
from openlora.bench.__main__ import main
sys.argv[1:] = {words!r}
sys.exit(main())
"""


def test_it_runs_with_the_engine_s_packages_alone(tmp_path):
    make_tiny_model(tmp_path / "model")
    small = ("--requests", "4", "--concurrency", "2", "--prompt", "5", "--output", "3")
    words = ("adapters", "--model", str(tmp_path / "model"), "--rank", "4", *small)
    services = {"msgspec", "redis", "kafka", "celery", "starlette", "uvicorn", "websockets"}
    others = {"fsspec", "aiohttp", "peft", "httpx", "rich", "psutil", "prometheus_client"}
    code = ON_A_BARE_MACHINE.format(blocked=services | others, words=[*words, "--adapters", "2"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapters"] == 2


def test_one_that_is_terminated_leaves_no_files(tmp_path):
    make_tiny_model(tmp_path / "model")
    (tmp_path / "scratch").mkdir()
    words = ("adapters", "--model", str(tmp_path / "model"), "--rank", "4", "--rounds", "9999")
    with subprocess.Popen(
        [sys.executable, "-m", "openlora.bench", *words],
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        stderr=subprocess.PIPE,
        text=True,
    ) as run_now:
        assert run_now.stderr is not None
        assert any("round 0" in line for line in run_now.stderr)
        assert list((tmp_path / "scratch").glob("openlora-bench-*"))
        run_now.terminate()
        run_now.stderr.read()
    assert run_now.returncode != 0
    assert list((tmp_path / "scratch").iterdir()) == []


def test_popularities():
    assert draw("identical", 9, 4, 0) == [0] * 4
    assert draw("distinct", 3, 5, 0) == [0, 1, 2, 0, 1]
    spread = draw("zipf", 9, 500, 0, apart=3)
    assert all(len(set(spread[i : i + 4])) == 4 for i in range(497))
    assert sorted(draw("uniform", 2, 9, 0, apart=5)[:2]) == [0, 1]
    uniform, zipf = (Counter(draw(p, 10, 10_000, 1)) for p in ("uniform", "zipf"))
    assert max(uniform.values()) < 1.3 * min(uniform.values())
    assert zipf[0] == pytest.approx(2 * zipf[1], rel=0.2)
    assert zipf[0] == pytest.approx(10 * zipf[9], rel=0.3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--adapters", "0"), "'0' is no whole number"),
        (("--adapters", "x"), "'x' is no whole number"),
        (("--popularity", "odd"), "popularity is 'odd'"),
        (("--room", "0"), "room is 0; it must be at least 1"),
        (("--model", "/nowhere"), "model is '/nowhere'"),
    ],
)
def test_settings_that_make_no_sense(words, says):
    with pytest.raises(SetupError, match=says):
        run(*words)
