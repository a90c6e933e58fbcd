"""A base model's shape, read from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openlora.errors import SetupError, UnknownModel
from openlora.kernels.rope import RopeScaling

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a decoder-only model.

    Attributes:
        max_model_len: longest context, prompt and output together.
        eos_token_ids: tokens that end a generation.
        dtype: the checkpoint's own, "float32", "bfloat16" or "float16".
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_model_len: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], name: str) -> ModelConfig:
        """From the content of a config.json.

        Args:
            raw: the parsed file.
            name: the model, for messages.

        Raises:
            UnknownModel: an architecture or feature that is not supported, with what is.
            SetupError: a field is missing or makes no sense.
        """
        architecture = (raw.get("architectures") or ["none named"])[0]
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise UnknownModel(
                f"model {name} has architecture {architecture}; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        _refuse_unsupported(raw, name)
        try:
            heads = int(raw["num_attention_heads"])
            hidden = int(raw["hidden_size"])
            config = cls(
                architecture=architecture,
                vocab_size=int(raw["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(raw["intermediate_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                rms_norm_eps=float(raw["rms_norm_eps"]),
                rope_theta=_rope_theta(raw),
                rope_scaling=_rope_scaling(raw, name),
                max_model_len=int(raw["max_position_embeddings"]),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                eos_token_ids=_token_ids(raw.get("eos_token_id")),
                dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SetupError(f"model {name}: config.json is unusable at {error}") from error
        _check_shape(config, name)
        return config


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a model directory; generation_config.json adds its EOS tokens.

    Raises:
        UnknownModel, SetupError: as ``ModelConfig.from_hf``; the directory holds no config.json.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UnknownModel(f"model {directory}: there is no config.json in it")
    raw = _read_json(path)
    generation = directory / "generation_config.json"
    if generation.is_file():
        extra = _read_json(generation).get("eos_token_id")
        if extra is not None:
            ids = {*_token_ids(raw.get("eos_token_id")), *_token_ids(extra)}
            raw = {**raw, "eos_token_id": sorted(ids)}
    return ModelConfig.from_hf(raw, str(directory))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SetupError(f"{path} holds no JSON object")
    return content


def _refuse_unsupported(raw: Mapping[str, Any], name: str) -> None:
    for field in ("attention_bias", "mlp_bias"):
        if raw.get(field):
            raise UnknownModel(f"model {name} has {field}; linears with biases are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnknownModel(f"model {name} has activation {raw['hidden_act']}; supported: silu")
    if raw.get("quantization_config"):
        raise UnknownModel(f"model {name} is quantized; supported: float32, bfloat16, float16")


def _rope_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 writes rope_parameters (theta included), older ones rope_scaling.
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _rope_theta(raw: Mapping[str, Any]) -> float:
    return float(_rope_fields(raw).get("rope_theta") or raw.get("rope_theta") or 10000.0)


def _rope_scaling(raw: Mapping[str, Any], name: str) -> RopeScaling | None:
    fields = _rope_fields(raw)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(fields["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind,
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_len=int(fields["original_max_position_embeddings"]),
        )
    raise UnknownModel(
        f"model {name} has rotary scaling {kind}; supported: default, linear, llama3"
    )


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def _check_shape(config: ModelConfig, name: str) -> None:
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_model_len",
    ):
        if getattr(config, field) < 1:
            raise SetupError(f"model {name}: {field} is {getattr(config, field)}; must be ≥ 1")
    if config.num_heads % config.num_kv_heads:
        raise SetupError(
            f"model {name}: {config.num_heads} heads are no multiple of "
            f"{config.num_kv_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise SetupError(f"model {name}: head_dim is {config.head_dim}; it must be even")
