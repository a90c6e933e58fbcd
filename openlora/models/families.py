"""What distinguishes the supported architectures, read from their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openlora.errors import UnknownModel
from openlora.models.rotary import rope_kind

Raw = Mapping[str, Any]

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_WINDOW = {"sliding_window": 4096}
"""What transformers assumes where a configuration says nothing of it."""
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        read: its own fields of ``ModelConfig``, from a config.json.
        hidden_act: activation where the configuration names none.
        head_dim: where the configuration names none; 0: hidden_size / heads.
        rope_theta: likewise.
        ties: whether embeddings are tied where the configuration does not say it.
    """

    read: Callable[[Raw, str], dict[str, Any]]
    hidden_act: str = "silu"
    head_dim: int = 0
    rope_theta: float = 10000.0
    ties: bool = False

    def features(self, raw: Raw, name: str) -> dict[str, Any]:
        """Fields of ``ModelConfig`` that differ from Llama's.

        Raises:
            UnknownModel: a feature that is not supported, with what is.
            KeyError, TypeError, ValueError: a field is missing or makes no sense.
        """
        hidden_act = raw.get("hidden_activation") or raw.get("hidden_act") or self.hidden_act
        if hidden_act not in _ACTIVATIONS:
            raise UnknownModel(
                f"model {name} has activation {hidden_act}; supported: {', '.join(_ACTIVATIONS)}"
            )
        if raw.get("use_bidirectional_attention"):
            raise UnknownModel(
                f"model {name} has use_bidirectional_attention; only causal attention is supported"
            )
        return {"hidden_act": _ACTIVATIONS[hidden_act], **self.read(raw, name)}


def _sliding(raw: Raw, name: str, slides: Callable[[int], bool]) -> dict[str, Any]:
    """The window; ``slides`` says which layers have it where ``layer_types`` does not."""
    window = raw.get("sliding_window")
    if window is None:
        return {}
    types = raw.get("layer_types")
    if types is None:
        layers = tuple(slides(layer) for layer in range(int(raw["num_hidden_layers"])))
    else:
        unknown = sorted({str(kind) for kind in types} - set(_LAYER_TYPES))
        if unknown:
            raise UnknownModel(
                f"model {name} has layers of type {unknown[0]}; "
                f"supported: {', '.join(_LAYER_TYPES)}"
            )
        layers = tuple(kind == "sliding_attention" for kind in types)
    if not any(layers):
        return {}
    if int(window) < 1:
        raise ValueError(f"sliding_window {window}")
    return {"sliding_window": int(window), "sliding_layers": layers}


def _llama(raw: Raw, name: str) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias"))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("mlp_bias"))}


def _mistral(raw: Raw, name: str) -> dict[str, Any]:
    # Its layer_types, where a configuration has any, are without effect in transformers.
    return _sliding({**_WINDOW, **raw, "layer_types": None}, name, lambda layer: True)


def _ministral(raw: Raw, name: str) -> dict[str, Any]:
    return _sliding({**_WINDOW, **raw}, name, lambda layer: True)


def _qwen2(raw: Raw, name: str) -> dict[str, Any]:
    return {"qkv_bias": True, **_qwen_window(raw, name)}


def _qwen3(raw: Raw, name: str) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias"))
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, **_qwen_window(raw, name)}


def _qwen_window(raw: Raw, name: str) -> dict[str, Any]:
    if not raw.get("use_sliding_window"):
        return {}
    first = int(raw.get("max_window_layers", 28))
    return _sliding({**_WINDOW, **raw}, name, lambda layer: layer >= first)


def _gemma(raw: Raw) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias"))
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "query_pre_attn_scalar": float(raw.get("query_pre_attn_scalar", 256)),
        "norm_offset": 1.0,
        "has_output_norms": True,
        "scale_embeddings": True,
    }


def _gemma2(raw: Raw, name: str) -> dict[str, Any]:
    return {
        **_gemma(raw),
        "attention_soft_cap": float(raw.get("attn_logit_softcapping", 50.0) or 0),
        "logits_soft_cap": float(raw.get("final_logit_softcapping", 30.0) or 0),
        **_sliding({**_WINDOW, **raw}, name, lambda layer: layer % 2 == 0),
    }


def _gemma3(raw: Raw, name: str) -> dict[str, Any]:
    pattern = int(raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6)
    rope = (raw.get("rope_parameters") or {}).get("sliding_attention") or {}
    if rope_kind(rope) != "default":
        raise UnknownModel(
            f"model {name} scales the rotary embedding of its sliding layers ({rope_kind(rope)}); "
            "supported: default"
        )
    theta = rope.get("rope_theta") or raw.get("rope_local_base_freq") or 10000.0
    return {
        **_gemma(raw),
        "qk_norm": True,
        "attention_soft_cap": float(raw.get("attn_logit_softcapping") or 0),
        "logits_soft_cap": float(raw.get("final_logit_softcapping") or 0),
        "local_rope_theta": float(theta),
        **_sliding({**_WINDOW, **raw}, name, lambda layer: (layer + 1) % pattern != 0),
    }


def _phi3(raw: Raw, name: str) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    return {
        "fused_projections": True,
        "partial_rotary_factor": float(partial),
        **_sliding({**raw, "layer_types": None}, name, lambda layer: True),
    }


FAMILIES = {
    "LlamaForCausalLM": Family(_llama),
    "MistralForCausalLM": Family(_mistral),
    "MinistralForCausalLM": Family(_ministral),
    "Qwen2ForCausalLM": Family(_qwen2),
    "Qwen3ForCausalLM": Family(_qwen3, head_dim=128),
    "Gemma2ForCausalLM": Family(_gemma2, "gelu_pytorch_tanh", 256, ties=True),
    "Gemma3ForCausalLM": Family(_gemma3, "gelu_pytorch_tanh", 256, 1e6, ties=True),
    "Phi3ForCausalLM": Family(_phi3),
}
"""By the name that config.json has under ``architectures``."""
