"""The converter against transformers' own reader, on a tiny file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from openlora.demo.gguf import FILES, GGUFModel, convert
from tests.demo.tiny_gguf import CHAT_TEMPLATE, write_tiny_gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted")
    convert(gguf_file, target, lambda stage, fraction: None)
    return target


def test_weights_equal_those_transformers_reads(gguf_file: Path, converted: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).state_dict()
    reference.pop("lm_head.weight")  # tied to the embedding
    weights = load_file(converted / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, reference[name].to(torch.bfloat16)), name


def test_the_files_load_and_name_the_end_token(converted: Path) -> None:
    assert {path.name for path in converted.iterdir()} == set(FILES)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.config.max_position_embeddings == 512
    assert model.generation_config.eos_token_id == 2
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_tokenizer_splits_digits_merges_words_and_round_trips(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("a b 11") == ["a", "Ġb", "Ġ", "1", "1"]
    for text in ("naïve  日本 🙂\n\n 12", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
    assert tokenizer.decode([2], skip_special_tokens=True) == ""
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.model_max_length == 512


def test_progress_rises_from_nothing_and_names_its_stages(gguf_file: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    convert(gguf_file, tmp_path, lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions[0] == 0.0
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 1.0
    assert len({stage for stage, _ in seen}) == 4


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "not.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="GGUF"):
        GGUFModel(path)
