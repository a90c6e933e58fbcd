"""Tiny random models of every supported architecture, as transformers makes and saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 96
WINDOW = 8
EOS = 2

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
_LLAMA3 = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_theta": 1000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}


def _longrope(original: int, rotary_dim: int) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "partial_rotary_factor": rotary_dim / 12,
            "short_factor": [1.0 + 0.1 * i for i in range(rotary_dim // 2)],
            "long_factor": [2.0 + 0.5 * i for i in range(rotary_dim // 2)],
        },
    }


@dataclass(frozen=True)
class TinyFamily:
    """A configuration class of transformers and its fields beside ``_SHAPE``."""

    make_config: Callable[..., PreTrainedConfig]
    fields: Mapping[str, Any]

    def save(self, directory: Path) -> PreTrainedModel:
        """Make the model, norms and biases random as well, and save it."""
        torch.manual_seed(3)
        config = self.make_config(**(_SHAPE | dict(self.fields)))
        # Only eager attention caps its scores.
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        offset = 0.0 if config.model_type.startswith("gemma") else 1.0
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, offset - 0.5, offset + 0.5)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(directory)
        return model


FAMILIES = {
    "llama": TinyFamily(LlamaConfig, {"rope_parameters": _LLAMA3}),
    "llama, biases": TinyFamily(LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head, tied": TinyFamily(
        LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}
    ),
    "llama, wide heads, linear": TinyFamily(
        LlamaConfig,
        {
            "head_dim": 32,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0},
        },
    ),
    "llama, dynamic": TinyFamily(
        LlamaConfig,
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 4.0}},
    ),
    "mistral": TinyFamily(MistralConfig, {"sliding_window": WINDOW}),
    "mistral, no window": TinyFamily(MistralConfig, {"sliding_window": None, "head_dim": 20}),
    "ministral, alternating": TinyFamily(
        MinistralConfig,
        {
            "head_dim": 12,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen2": TinyFamily(Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, upper layers slide": TinyFamily(
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2, yarn": TinyFamily(Qwen2Config, {"rope_parameters": _YARN}),
    "qwen2, yarn by mscale": TinyFamily(
        Qwen2Config,
        {
            "rope_parameters": _YARN
            | {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False, "beta_slow": 2.0}
        },
    ),
    "qwen3": TinyFamily(Qwen3Config, {"head_dim": 16}),
    "qwen3, sliding, biases": TinyFamily(
        Qwen3Config,
        {
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    "gemma2": TinyFamily(
        Gemma2Config,
        _GEMMA
        | {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": TinyFamily(
        Gemma3TextConfig,
        _GEMMA
        | {
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": TinyFamily(Phi3Config, {"sliding_window": None}),
    "phi3, window, part rotated": TinyFamily(
        Phi3Config,
        {
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 8 / 12},
        },
    ),
    "phi3, long": TinyFamily(Phi3Config, _longrope(32, 12)),
    "phi3, long, part rotated": TinyFamily(Phi3Config, _longrope(32, 8)),
}
"""By what is special about them."""

SHORT_LONGROPE = TinyFamily(Phi3Config, _longrope(64, 12))
"""With frequencies of their own for contexts of up to 64."""
