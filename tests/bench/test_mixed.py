"""The mixed benchmark: its loads, its subjects, and a small run of all of it."""

from __future__ import annotations

import argparse
import json

import pytest
from transformers import LlamaConfig

from openlora.bench import mixed
from openlora.bench.mixed_load import Workload
from openlora.bench.mixed_report import MixedRow, print_table
from openlora.bench.mixed_subject import random_subject, write_byte_tokenizer
from openlora.errors import SetupError
from openlora.models.config import read_config
from openlora.models.dummy import DUMMY_CONFIGS
from workers.tokenizer import PromptTokenizer

RATES = {
    "engine_tok_s",
    "batch_tok_s",
    "share_of_engine",
    "engine_streams_tok_s",
    "streams_tok_s",
    "streams_share_of_engine",
    "first_empty_p50_ms",
    "first_batch_p99_ms",
    "step_ms",
}


def parsed(*words):
    parser = argparse.ArgumentParser()
    mixed.add_arguments(parser)
    return parser.parse_args(words)


def test_no_two_prompts_of_a_run_begin_alike():
    loads = mixed._loads(parsed("--lines", "4000", "--prompt", "80"), random_demo())
    prompts = [
        load.prompt(number)
        for load in (loads.warm, loads.batch, loads.streams, loads.long)
        for number in range(load.lines)
    ]
    assert len({prompt[:16] for prompt in prompts}) == len(prompts)
    assert min(map(len, prompts)) == 80


def random_demo():
    return mixed.Subject("demo", None, ())


def test_adapters_and_the_base_model_take_turns():
    load = Workload(4, 8, ("a", "b"))
    assert [load.adapter(number) for number in range(4)] == [None, "a", "b", None]
    lines = [json.loads(line) for line in load.batch_file().splitlines()]
    assert [line.get("adapter") for line in lines] == [None, "a", "b", None]
    assert {line["max_tokens"] for line in lines} == {8}


@pytest.mark.parametrize("shape", ["8b", "1b"])
def test_a_random_model_has_the_configuration_of_its_shape(shape, tmp_path):
    subject = random_subject(shape, 0, "bfloat16", tmp_path)
    assert read_config(subject.model) == DUMMY_CONFIGS[shape]
    assert (subject.name, subject.adapters, subject.load_format) == (shape, (), "dummy")


def test_a_shape_without_room_for_all_bytes_is_refused(tmp_path):
    config = json.loads(LlamaConfig(vocab_size=160).to_json_string())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match="160 tokens; it must have 256"):
        random_subject(str(tmp_path), 0, "float32", tmp_path)


def test_the_byte_tokenizer_knows_every_token(tmp_path):
    write_byte_tokenizer(tmp_path, 300)
    tokenizer = PromptTokenizer(str(tmp_path)).backend
    assert len(tokenizer.encode("day 7").ids) == 5
    assert tokenizer.decode([*tokenizer.encode("day 7").ids, 299]) == "day 7 w299"


def test_no_rounds_measure_nothing():
    with pytest.raises(SetupError, match="rounds is 0"):
        mixed.run(parsed("--rounds", "0"))


def test_the_table_names_every_goal(capsys):
    rates = dict.fromkeys(RATES, 10.0) | {"first_empty_p99_ms": 1.0, "first_batch_p50_ms": 12.0}
    row = MixedRow(
        model="m",
        device="cpu",
        cores=2,
        adapters=5,
        lines=8,
        tokens=4,
        prompt_tokens=20.0,
        engine_rounds=[9.0, 11.0],
        batch_rounds=[10.0, 10.0],
        streams=2,
        stream_tokens=4,
        engine_streams_rounds=[10.0],
        streams_rounds=[10.0],
        batch_cores={"engine": 1.8},
        **rates,
    )
    print_table(row)
    printed = capsys.readouterr().out
    assert printed.count("≥ 95%") == 2
    assert "≤ 20.0" in printed
    assert "≤ 21.0" in printed
    assert "9 11" in printed


@pytest.mark.long
@pytest.mark.services
def test_a_small_run_measures_engine_and_system_in_turns(tmp_path, capsys):
    (tmp_path / "tiny").mkdir()
    settings = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    (tmp_path / "tiny" / "config.json").write_text(settings.to_json_string())
    out = tmp_path / "rows.jsonl"
    words = ["--shape", str(tmp_path / "tiny"), "--adapters", "2", "--device", "cpu"]
    words += ["--rounds", "2", "--lines", "12", "--tokens", "4", "--streams", "3"]
    words += ["--stream-tokens", "4", "--requests", "2", "--out", str(out)]
    assert mixed.run(parsed(*words)) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["model"], row["adapters"], row["lines"]) == ("tiny", 2, 12)
    assert all(row[name] > 0 for name in RATES - {"step_ms"})  # all tokens may come at once
    assert [len(row[name]) for name in ("engine_rounds", "batch_rounds")] == [2, 2]
    assert {"engine", "worker I/O", "broker", "redis"} <= set(row["batch_cores"])
    assert "share of the engine" in capsys.readouterr().out
