"""The decode benchmark on a tiny shape: the rows it promises, and what it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from openlora.bench import decode, decode_compare
from openlora.bench.decode_profile import busy_share
from openlora.bench.measure import make_requests, read_bytes_per_s
from openlora.bench.random_adapters import adapter_bytes, write_adapter
from openlora.errors import SetupError
from openlora.models import dummy
from openlora.models.config import read_config
from tests.engine.tiny_model import make_tiny_model

KEYS = {
    *("case", "model", "rank", "batch", "distinct", "prompt", "output", "lora", "gpu_adapters"),
    *("step_ms", "decode_tok_s", "ttft_batch_ms", "targets", "ensemble", "first_run_s"),
    *("device", "torch", "date"),
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench") / "model"
    make_tiny_model(directory)
    return directory


def run(*words):
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    assert decode.run(parser.parse_args(["--device", "cpu", *words])) == 0


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def tiny_shape(tiny_model, monkeypatch):
    """The shape "1b" is tiny for this test."""
    monkeypatch.setitem(dummy.DUMMY_CONFIGS, "1b", read_config(tiny_model))


SMALL = ("--shape", "1b", "--prompt", "8", "--output", "4", "--gpu-adapters", "4")


def test_every_batch_runs_with_every_number_of_adapters_it_holds(tiny_shape, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    run(*SMALL, "--batch", "1,4", "--distinct", "0,1,4", "--rank", "20", "--out", str(out))
    start, *rows = rows_of(out)
    assert start["case"] == "start"
    assert start["ready_s"] > 0
    assert [(row["batch"], row["distinct"]) for row in rows] == [
        *((1, 0), (1, 1), (4, 0), (4, 1), (4, 4)),
    ]
    assert all(set(row) == KEYS and row["case"] == "decode" for row in rows)
    assert all(row["ttft_batch_ms"] > 0 for row in rows)
    assert capsys.readouterr().out.splitlines() == out.read_text().splitlines()


def test_a_deterministic_run_needs_a_gpu_and_says_so(tiny_shape):
    with pytest.raises(SetupError, match="deterministic is set, but the device is 'cpu'"):
        run(*SMALL, "--batch", "1", "--distinct", "0", "--deterministic")
    with pytest.raises(SetupError, match="--deterministic is measured with --shape"):
        run("--model", "demo", "--deterministic")


def test_base_alone_needs_no_pages(tiny_shape, tmp_path):
    out = tmp_path / "rows.jsonl"
    run(*SMALL, "--batch", "2", "--distinct", "0", "--lora", "off", "--out", str(out))
    assert rows_of(out)[1]["lora"] == "off"


def test_ranks_take_turns_and_requests_can_use_two_adapters(tiny_shape, tmp_path):
    out = tmp_path / "rows.jsonl"
    words = ("--rank", "4,20", "--targets", "attention", "--ensemble", "2", "--out", str(out))
    run(*SMALL, "--batch", "4", "--distinct", "4", *words)
    row = rows_of(out)[1]
    assert (row["rank"], row["targets"], row["ensemble"]) == ([4, 20], "attention", 2)


def test_loads_are_measured_beside_a_batch(tiny_shape, tmp_path):
    out = tmp_path / "rows.jsonl"
    run(*SMALL, "--loads", "--out", str(out))
    row = rows_of(out)[1]
    assert (row["case"], row["batch"]) == ("loads", 3)
    for kind in ("resident", "host", "files"):
        assert row[f"{kind}_step_ms"] > 0
        assert row[f"{kind}_ttft_ms"] > 0


def test_busy_is_the_union_of_what_runs():
    spans = [("a", 0, 10), ("b", 5, 20), ("c", 30, 40), ("d", 31, 35)]
    assert busy_share(spans) == pytest.approx(30 / 40)
    assert busy_share([]) == 0.0


def test_zipf_counts_the_adapters_drawn(tiny_shape, tmp_path):
    out = tmp_path / "rows.jsonl"
    run(*SMALL, "--batch", "4", "--zipf-pool", "50", "--requests", "12", "--out", str(out))
    _, row = rows_of(out)
    assert set(row) >= {"case", "requests", "pool", "adapters", "seconds", "out_tok_s"}
    assert (row["case"], row["requests"], row["pool"]) == ("zipf", 12, 50)
    assert 4 < row["adapters"] <= 12


def test_real_weights_run_beside_transformers_and_peft(tiny_model, tmp_path, monkeypatch):
    # It reads five gibibytes before every case.
    quick = partial(read_bytes_per_s, num_bytes=1 << 24, repeats=1)
    monkeypatch.setattr(decode_compare, "read_bytes_per_s", quick)
    out = tmp_path / "rows.jsonl"
    words = ("--model", str(tiny_model), "--batch", "1,2", "--distinct", "0,1,2", "--rank", "4")
    run(*words, "--prompt", "6", "--output", "4", "--out", str(out))
    memory, *rows = rows_of(out)
    assert memory["read_gb_s"] > 0
    assert [(row["batch"], row["distinct"], row["peers"]) for row in rows] == [
        *((1, 0, "transformers"), (1, 1, "PEFT")),
        *((2, 0, "transformers"), (2, 1, "PEFT"), (2, 2, "PEFT")),
    ] * 2
    assert [row["dtype"] for row in rows] == ["float32"] * 5 + ["bfloat16"] * 5
    assert all(row["peers_dtype"] == "float32" for row in rows[:5])
    for row in rows:
        for kind in ("decode", "total"):
            ratio = row[f"{kind}_tok_s"] / row[f"peers_{kind}_tok_s"]
            assert row[f"{kind}_ratio"] == pytest.approx(ratio, rel=1e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "off"], "--lora off serves the base model alone"),
        (["--gpu-adapters", "8"], "distinct is 64, but --gpu-adapters 8"),
        (["--batch", "0"], "batch is 0"),
        (["--ensemble", "2", "--distinct", "1"], "an ensemble of 2 needs"),
        (["--model", "demo", "--rank", "4,8"], "of one rank"),
        (["--model", "/no/such"], "it must be demo or a directory"),
        (["--model", "demo", "--output", "1"], "output is 1"),
        (["--model", "demo", "--batch", "2", "--distinct", "4"], "cannot hold"),
    ],
)
def test_what_cannot_be_is_said(words, message):
    with pytest.raises(SetupError, match=message):
        run(*words)


def test_a_list_that_is_none_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--batch", "1,x")
    assert ended.value.code == 2
    assert "'1,x' is not a list" in capsys.readouterr().err


def test_random_adapters_are_peft_s_own_format(tiny_model, tmp_path):
    config = read_config(tiny_model)
    path = write_adapter(tmp_path / "a", config, rank=4, seed=1, dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, path)
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    assert sum(p.numel() * 4 for p in lora) == adapter_bytes(config, 4, 4)
    assert all(p.abs().max() > 0 for p in lora)


def test_requests_share_adapters_in_turn_and_seeds_repeat():
    def make(seed):
        return make_requests(
            5, ["a", "b"], prompt_tokens=3, output_tokens=2, vocab_size=100, seed=seed
        )

    assert [next(iter(r.adapters)) for r in make(1)] == ["a", "b", "a", "b", "a"]
    assert make(1) == make(1)
    assert make(1) != make(2)


def test_memory_speed_is_plausible():
    assert 1e8 < read_bytes_per_s(torch.device("cpu"), num_bytes=1 << 24, repeats=2) < 1e12


def test_the_module_needs_the_engine_s_packages_alone_and_tells_errors_in_a_line():
    blocked = ("kafka", "redis", "msgspec", "starlette", "uvicorn", "websockets", "rich", "httpx")
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "sys.argv = ['bench', 'decode', '--batch', '0']\n"
        "runpy.run_module('openlora.bench', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "openlora bench: batch is 0; it must be at least 1\n"


def test_a_case_runs_with_the_engine_s_packages_alone():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('kafka', 'redis', 'msgspec', 'starlette', 'rich')))\n"
        "import openlora.bench.decode_cases, openlora.bench.decode_compare"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
