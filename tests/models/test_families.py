"""config.json as it is found on the hub, old and new: the same as transformers understands it."""

from __future__ import annotations

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from openlora.errors import SetupError, UnknownModel
from openlora.models.config import ModelConfig

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SMALL_WINDOW = {"sliding_window": 512}
CASES = {
    "mistral 7b v0.1": ("MistralForCausalLM", MistralConfig, {"sliding_window": 4096}),
    "mistral 7b v0.3": (
        "MistralForCausalLM",
        MistralConfig,
        {"sliding_window": None, "rope_theta": 1000000.0, "head_dim": 32},
    ),
    "mistral, window unsaid": ("MistralForCausalLM", MistralConfig, {}),
    "qwen2.5, window off": (
        "Qwen2ForCausalLM",
        Qwen2Config,
        {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 3},
    ),
    "qwen2, upper layers": (
        "Qwen2ForCausalLM",
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 3},
    ),
    "qwen2, no layer slides": (
        "Qwen2ForCausalLM",
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 28},
    ),
    "qwen3": ("Qwen3ForCausalLM", Qwen3Config, {"rope_theta": 1000000, "head_dim": 128}),
    "qwen3, head_dim unsaid": ("Qwen3ForCausalLM", Qwen3Config, {"attention_bias": True}),
    "gemma 2": (
        "Gemma2ForCausalLM",
        Gemma2Config,
        {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "sliding_window": 4096,
        },
    ),
    "gemma 2, almost nothing said": ("Gemma2ForCausalLM", Gemma2Config, {}),
    "gemma 2, uncapped": (
        "Gemma2ForCausalLM",
        Gemma2Config,
        {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    ),
    "gemma 3 as first saved": (
        "Gemma3ForCausalLM",
        Gemma3TextConfig,
        {
            **SMALL_WINDOW,
            "head_dim": 32,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window_pattern": 4,
        },
    ),
    "gemma 3, almost nothing said": ("Gemma3ForCausalLM", Gemma3TextConfig, SMALL_WINDOW),
    "phi-3 mini 4k": (
        "Phi3ForCausalLM",
        Phi3Config,
        {"sliding_window": 2047, "original_max_position_embeddings": 4096},
    ),
    "phi-3 mini 128k": (
        "Phi3ForCausalLM",
        Phi3Config,
        {
            "sliding_window": 8000,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            },
        },
    ),
    "phi-4 mini": (
        "Phi3ForCausalLM",
        Phi3Config,
        {
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 6,
                "long_factor": [2.0] * 6,
            },
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_means_what_it_means_to_transformers(name):
    architecture, config_class, fields = CASES[name]
    raw = SHAPE | fields | {"architectures": [architecture]}
    ours = ModelConfig.from_hf(raw, "m")
    # Their class fills in every default and knows the old names.
    theirs = config_class(**(SHAPE | fields)).to_dict() | {"architectures": [architecture]}
    assert ours == ModelConfig.from_hf(theirs | {"dtype": "bfloat16"}, "m")
    types = theirs.get("layer_types")
    if types is not None and ours.sliding_window:
        assert ours.sliding_layers == tuple(kind == "sliding_attention" for kind in types)


def config(architecture, **fields):
    return ModelConfig.from_hf(SHAPE | fields | {"architectures": [architecture]}, "m")


def test_what_the_families_have_of_their_own():
    gemma2 = config("Gemma2ForCausalLM", query_pre_attn_scalar=16)
    assert gemma2.sliding_layers == (True, False) * 4
    assert (gemma2.window(0), gemma2.window(1)) == (4096, 0)
    assert gemma2.attention_scale == 0.25
    assert gemma2.tie_word_embeddings
    assert gemma2.head_dim == 256
    gemma3 = config("Gemma3ForCausalLM", sliding_window=512)
    assert [layer for layer in range(8) if not gemma3.is_sliding(layer)] == [5]
    assert (gemma3.rope_theta, gemma3.local_rope_theta) == (1e6, 1e4)
    assert config("Phi3ForCausalLM", sliding_window=2047).window(7) == 2047
    assert config("Phi3ForCausalLM", partial_rotary_factor=0.5).rotary_dim == 8


def test_a_window_as_wide_as_the_context_is_none():
    phi = config("Phi3ForCausalLM", sliding_window=2047)
    assert phi.limited_to(2047).sliding_window == 0
    assert phi.limited_to(2048).sliding_window == 2047
    assert phi.limited_to(10**6).max_model_len == 8192
    assert config("MistralForCausalLM", sliding_window=8192).sliding_window == 0
    # Gemma 3's sliding layers keep their rotary embedding.
    assert config("Gemma3ForCausalLM").limited_to(100).is_sliding(0)


def test_yarn_extends_the_context():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    assert config("Qwen2ForCausalLM", rope_scaling=scaling).max_model_len == 32768


@pytest.mark.parametrize(
    ("architecture", "fields", "error", "says"),
    [
        ("Gemma3ForConditionalGeneration", {}, UnknownModel, "supported: .*Gemma3ForCausalLM"),
        ("MixtralForCausalLM", {}, UnknownModel, "MixtralForCausalLM; supported: LlamaForCausalLM"),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 8},
            UnknownModel,
            "chunked_attention; supported: full_attention",
        ),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            UnknownModel,
            "sliding layers",
        ),
        ("MistralForCausalLM", {"sliding_window": 0}, SetupError, "sliding_window 0"),
        (
            "Gemma2ForCausalLM",
            {"layer_types": ["sliding_attention"] * 3},
            SetupError,
            "3 entries for 8 layers",
        ),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            SetupError,
            "need 8 numbers",
        ),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.2}, SetupError, "even number"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "linear"}}, SetupError, "factor"),
    ],
)
def test_what_cannot_be_served_is_said(architecture, fields, error, says):
    with pytest.raises(error, match=says):
        config(architecture, **fields)
