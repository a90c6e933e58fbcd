"""A base model's shape, read from a Hugging Face config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openlora.errors import SetupError, UnknownModel
from openlora.models.families import FAMILIES
from openlora.models.rotary import KINDS, RopeScaling, read_scaling, rope_kind

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a decoder-only model. What has a default is as in Llama.

    Attributes:
        max_model_len: longest context, prompt and output together.
        eos_token_ids: tokens that end a generation.
        dtype: the checkpoint's own, "float32", "bfloat16" or "float16".
        partial_rotary_factor: share of each head's dimensions, the first ones, that is rotated.
        local_rope_theta: base of the sliding layers' rotary embedding, unscaled; None: they
            rotate like all others.
        sliding_window: how many positions, its own included, a query of a sliding layer sees;
            0: all. The KV cache keeps all positions nevertheless.
        sliding_layers: one entry per layer; empty: no layer is a sliding one.
        qkv_bias, o_bias, mlp_bias: which linears have biases.
        qk_norm: each head of q and k is normed before it is rotated.
        hidden_act: "silu" or "gelu_tanh", of the MLP's gate.
        query_pre_attn_scalar: scores are divided by its root; None: by that of ``head_dim``.
        attention_soft_cap, logits_soft_cap: s becomes cap · tanh(s / cap); 0: not capped.
        norm_offset: what is added to every norm's weight.
        has_output_norms: attention and MLP are normed behind as well, before they are added.
        scale_embeddings: embeddings are multiplied by √hidden_size.
        fused_projections: the checkpoint, and adapters, have q, k, v and gate, up as one linear.
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
    partial_rotary_factor: float = 1.0
    local_rope_theta: float | None = None
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    query_pre_attn_scalar: float | None = None
    attention_soft_cap: float = 0.0
    logits_soft_cap: float = 0.0
    norm_offset: float = 0.0
    has_output_norms: bool = False
    scale_embeddings: bool = False
    fused_projections: bool = False

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_scale(self) -> float:
        """What q·k is multiplied with."""
        return 1 / math.sqrt(self.query_pre_attn_scalar or self.head_dim)

    def is_sliding(self, layer: int) -> bool:
        """Whether the layer is one of the sliding ones."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    def window(self, layer: int) -> int:
        """Positions that a query of the layer sees, its own included; 0: all."""
        return self.sliding_window if self.is_sliding(layer) else 0

    def limited_to(self, max_model_len: int) -> ModelConfig:
        """The same for contexts of at most ``max_model_len``: a window as wide is none."""
        limit = min(max_model_len, self.max_model_len)
        window = self.sliding_window if self.sliding_window < limit else 0
        return replace(self, max_model_len=limit, sliding_window=window)

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
        if architecture not in FAMILIES:
            raise UnknownModel(
                f"model {name} has architecture {architecture}; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        if raw.get("quantization_config"):
            raise UnknownModel(f"model {name} is quantized; supported: float32, bfloat16, float16")
        family = FAMILIES[architecture]
        try:
            heads = int(raw["num_attention_heads"])
            hidden = int(raw["hidden_size"])
            max_len = int(raw["max_position_embeddings"])
            rope = _rope_fields(raw)
            scaling = _rope_scaling(raw, rope, max_len, name)
            tied = raw.get("tie_word_embeddings")
            config = cls(
                architecture=architecture,
                vocab_size=int(raw["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(raw["intermediate_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or family.head_dim or hidden // heads),
                rms_norm_eps=float(raw["rms_norm_eps"]),
                rope_theta=float(
                    rope.get("rope_theta") or raw.get("rope_theta") or family.rope_theta
                ),
                rope_scaling=scaling,
                max_model_len=_max_model_len(max_len, scaling),
                tie_word_embeddings=bool(family.ties if tied is None else tied),
                eos_token_ids=_token_ids(raw.get("eos_token_id")),
                dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
                **family.features(raw, name),
            ).limited_to(_max_model_len(max_len, scaling))
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


def _rope_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 writes rope_parameters (theta included), older ones rope_scaling.
    fields = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    # By layer type where these differ (Gemma 3): the sliding layers' are the family's business.
    nested = fields.get("full_attention")
    return nested if isinstance(nested, Mapping) else fields


def _rope_scaling(
    raw: Mapping[str, Any], fields: Mapping[str, Any], max_len: int, name: str
) -> RopeScaling | None:
    if rope_kind(fields) not in KINDS:
        raise UnknownModel(
            f"model {name} has rotary scaling {rope_kind(fields)}; supported: {', '.join(KINDS)}"
        )
    original = raw.get("original_max_position_embeddings")
    return read_scaling(fields, max_len, int(original) if original else None)


def _max_model_len(max_len: int, scaling: RopeScaling | None) -> int:
    # Configurations with YaRN often keep the length that the model had before.
    if scaling is not None and scaling.kind == "yarn":
        return max(max_len, int(scaling.factor * scaling.original_max_len))
    return max_len


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
    if config.rotary_dim < 2 or config.rotary_dim % 2:
        raise SetupError(
            f"model {name}: {config.rotary_dim} of head_dim {config.head_dim} are rotated; "
            "that must be an even number, at least 2"
        )
    if config.sliding_layers and len(config.sliding_layers) != config.num_layers:
        raise SetupError(
            f"model {name}: layer_types has {len(config.sliding_layers)} entries for "
            f"{config.num_layers} layers"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        for factors in (scaling.short_factors, scaling.long_factors):
            if len(factors) != config.rotary_dim // 2:
                raise SetupError(
                    f"model {name}: short_factor and long_factor need {config.rotary_dim // 2} "
                    f"numbers, one has {len(factors)}"
                )
