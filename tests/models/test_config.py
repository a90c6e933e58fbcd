"""config.json → ModelConfig: what is read, and what is refused by name."""

from __future__ import annotations

import json

import pytest

from openlora.errors import SetupError, UnknownModel
from openlora.models.config import ModelConfig, read_config
from openlora.models.rotary import RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_defaults_of_a_minimal_config():
    config = ModelConfig.from_hf(LLAMA, "m")
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert config.eos_token_ids == ()
    assert config.dtype == "float32"
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}},
    ],
)
def test_rope_in_old_and_new_form(fields):
    config = ModelConfig.from_hf(LLAMA | fields, "m")
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_generation_config_adds_its_eos_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_config(tmp_path).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported: LlamaForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"hidden_act": "gelu"}, "gelu; supported: silu, gelu_pytorch_tanh"),
        ({"use_bidirectional_attention": True}, "only causal"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional.*longrope"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, says):
    with pytest.raises(UnknownModel, match=says):
        ModelConfig.from_hf(LLAMA | fields, "m")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": "wide"}, "wide"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 15}, "even"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_nonsense_is_a_setup_error(fields, says):
    with pytest.raises(SetupError, match=says):
        ModelConfig.from_hf(LLAMA | fields, "m")


def test_missing_field_is_named():
    fields = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    with pytest.raises(SetupError, match="vocab_size"):
        ModelConfig.from_hf(fields, "m")


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_broken_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SetupError, match=r"config\.json"):
        read_config(tmp_path)
