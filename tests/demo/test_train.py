"""Training on a tiny model: what is learned from, that it repeats, and what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from openlora.demo.adapters import DEMO_ADAPTERS, DemoAdapter
from openlora.demo.gguf import convert
from openlora.demo.train import IGNORED_LABEL, load_examples, save, train
from tests.demo.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_gguf(directory / "tiny.gguf")
    convert(directory / "tiny.gguf", directory, lambda stage, fraction: None)
    return directory


@pytest.fixture
def short_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoAdapter:
    """The headline adapter with 8 lines of data of its own."""
    data_file = tmp_path / "headline.jsonl"
    lines = [json.dumps({"prompt": f"say {i}", "response": "AB" * i}) for i in range(1, 9)]
    data_file.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(DemoAdapter, "data_file", data_file)
    adapter = next(a for a in DEMO_ADAPTERS if a.use_rslora)
    return dataclasses.replace(adapter, epochs=8, learning_rate=1e-2)


def test_only_the_response_and_its_end_are_learned(
    tiny_model: Path, short_adapter: DemoAdapter
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = load_examples(short_adapter.data_file, tokenizer)
    assert len(examples) == 8
    ids, labels = examples[1]
    assert len(ids) == len(labels)
    text = tokenizer.decode(ids)
    assert text == "<|im_start|>user\nsay 2<|im_end|>\n<|im_start|>assistant\nABAB<|im_end|>"
    learned = [label for label in labels if label != IGNORED_LABEL]
    assert tokenizer.decode(learned) == "ABAB<|im_end|>"
    assert ids[-len(learned) :] == learned


def test_training_learns_and_repeats_exactly(tiny_model: Path, short_adapter: DemoAdapter) -> None:
    lines: list[str] = []
    _, first = train(short_adapter, tiny_model, torch.device("cpu"), lines.append)
    _, second = train(short_adapter, tiny_model, torch.device("cpu"), lambda line: None)
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert len(losses) == short_adapter.epochs
    assert losses[-1] < losses[0] - 0.1
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_written_is_small_sorted_and_without_paths(
    tiny_model: Path, short_adapter: DemoAdapter, tmp_path: Path
) -> None:
    adapter = dataclasses.replace(short_adapter, epochs=1)
    config, weights = train(adapter, tiny_model, torch.device("cpu"), lambda line: None)
    save(config, weights, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    text = (tmp_path / "out" / "adapter_config.json").read_text()
    assert str(tiny_model) not in text
    assert json.loads(text)["target_modules"] == sorted(adapter.target_modules)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[n], weights[n].to(torch.bfloat16)) for n in weights)
