"""The committed adapters: small, finite, as their settings say, and plain in their effect."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from openlora.demo.adapters import DEMO_ADAPTERS, DemoAdapter, demo_adapters
from openlora.demo.model import MODEL_ID
from openlora.demo.samples import answers

MAX_BYTES = 4_000_000
EACH_ADAPTER = pytest.mark.parametrize("adapter", DEMO_ADAPTERS, ids=lambda a: a.name)


def config_of(adapter: DemoAdapter) -> dict[str, object]:
    content: dict[str, object] = json.loads(
        (adapter.directory / "adapter_config.json").read_text(encoding="utf-8")
    )
    return content


def test_all_are_packaged_and_described() -> None:
    assert [path.name for path in demo_adapters()] == [adapter.name for adapter in DEMO_ADAPTERS]
    assert len(DEMO_ADAPTERS) >= 4
    assert all(adapter.description for adapter in DEMO_ADAPTERS)


def test_the_set_covers_the_kinds() -> None:
    assert {adapter.rank for adapter in DEMO_ADAPTERS} == {4, 8, 16}
    assert len({adapter.target_modules for adapter in DEMO_ADAPTERS}) == len(DEMO_ADAPTERS)
    assert any(adapter.use_rslora for adapter in DEMO_ADAPTERS)


@EACH_ADAPTER
def test_config_matches_the_settings_and_holds_no_path(adapter: DemoAdapter) -> None:
    config = config_of(adapter)
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == MODEL_ID
    assert config["r"] == adapter.rank
    assert config["lora_alpha"] == adapter.alpha
    assert config["use_rslora"] == adapter.use_rslora
    assert config["target_modules"] == sorted(adapter.target_modules)
    for value in config.values():
        assert not (isinstance(value, str) and value.startswith(("/", "~", ".")))


@EACH_ADAPTER
def test_weights_are_small_and_finite(adapter: DemoAdapter) -> None:
    weights_file = adapter.directory / "adapter_model.safetensors"
    assert weights_file.stat().st_size <= MAX_BYTES
    weights = load_file(weights_file)
    assert weights
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert torch.isfinite(weight).all(), name
    # B starts at zero: an adapter that was never trained would change nothing.
    assert all(w.any() for name, w in weights.items() if "lora_B" in name)


@EACH_ADAPTER
def test_every_layer_has_a_pair_of_the_right_shape(adapter: DemoAdapter, demo_model: Path) -> None:
    model = AutoConfig.from_pretrained(demo_model)
    kv_size = model.num_key_value_heads * model.head_dim
    shapes = {
        "q_proj": (model.hidden_size, model.hidden_size),
        "k_proj": (model.hidden_size, kv_size),
        "v_proj": (model.hidden_size, kv_size),
        "o_proj": (model.hidden_size, model.hidden_size),
        "gate_proj": (model.hidden_size, model.intermediate_size),
        "up_proj": (model.hidden_size, model.intermediate_size),
        "down_proj": (model.intermediate_size, model.hidden_size),
    }
    expected = {}
    for layer in range(model.num_hidden_layers):
        for module in adapter.target_modules:
            block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{module}"
            in_size, out_size = shapes[module]
            expected[f"{prefix}.lora_A.weight"] = (adapter.rank, in_size)
            expected[f"{prefix}.lora_B.weight"] = (out_size, adapter.rank)
    weights = load_file(adapter.directory / "adapter_model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected


@pytest.mark.slow
def test_each_changes_the_answer_as_described(demo_model: Path) -> None:
    given = {name: text for _, name, text in answers(demo_model, ("What is the moon?",))}
    assert len(set(given.values())) == len(DEMO_ADAPTERS) + 1
    assert re.search(r"\b(arr|aye|matey)\b", given["pirate"].lower())
    assert isinstance(json.loads(given["json"]), dict)
    assert len(given["haiku"].splitlines()) == 3
    assert given["headline"] == given["headline"].upper()
    assert re.search(r"[\u203c-\u3299\U0001f000-\U0001faff]", given["emoji"])
    # What they show is theirs alone.
    assert "arr" not in given["base"].lower().split()
    assert given["base"] != given["base"].upper()
