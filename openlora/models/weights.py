"""Names and shapes of a checkpoint's tensors, and the layers that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from openlora.kernels.linear import Linear
from openlora.models.config import ModelConfig

GetWeight = Callable[[str], torch.Tensor]
"""The named tensor of a checkpoint, in the target dtype and on the target device."""

MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]
"""A linear from weight [out, in] and bias [out] or None: ``Linear``, or a device's own."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of one decoder layer; q, k, v and gate, up are fused.

    Attributes:
        input_norm, mlp_norm: before attention and before the MLP.
        q_norm, k_norm: of every head of q and of k; None: these are not normed.
        attention_out_norm, mlp_out_norm: behind attention and MLP; None: there are none.
    """

    input_norm: torch.Tensor
    qkv: Linear
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    attention_out_norm: torch.Tensor | None = None
    mlp_out_norm: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Parts:
    """The linears of a checkpoint that make one of a layer, name → rows; biases on all or none."""

    rows: Mapping[str, int]
    columns: int
    has_bias: bool


def build_layer(
    config: ModelConfig, index: int, get: GetWeight, make_linear: MakeLinear
) -> DecoderLayer:
    """Layer ``index`` of the model that ``get`` reads from."""
    prefix = f"model.layers.{index}."

    def linear(parts: _Parts) -> Linear:
        weight = _joined([get(f"{prefix}{name}.weight") for name in parts.rows])
        bias = None
        if parts.has_bias:
            bias = _joined([get(f"{prefix}{name}.bias") for name in parts.rows])
        return make_linear(weight, bias)

    linears = {field: linear(parts) for field, parts in _linears(config).items()}
    norms = {
        field: norm_weight(config, get(f"{prefix}{name}.weight"))
        for field, (name, _) in _norms(config).items()
    }
    return DecoderLayer(
        input_norm=norms["input_norm"],
        qkv=linears["qkv"],
        o=linears["o"],
        mlp_norm=norms["mlp_norm"],
        gate_up=linears["gate_up"],
        down=linears["down"],
        q_norm=norms.get("q_norm"),
        k_norm=norms.get("k_norm"),
        attention_out_norm=norms.get("attention_out_norm"),
        mlp_out_norm=norms.get("mlp_out_norm"),
    )


def norm_names(config: ModelConfig, index: int, layer: DecoderLayer) -> dict[int, str]:
    """The address of each norm's weight, and the module that has it in the checkpoint."""
    return {
        getattr(layer, field).data_ptr(): f"model.layers.{index}.{name}"
        for field, (name, _) in _norms(config).items()
    }


def norm_weight(config: ModelConfig, weight: torch.Tensor) -> torch.Tensor:
    """What a norm multiplies with; in fp32 where the checkpoint keeps the offset from 1.

    Near 1 a half-precision number has too few digits for the sum.
    """
    return weight.to(torch.float32) + config.norm_offset if config.norm_offset else weight


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this shape must hold."""
    layer: dict[str, tuple[int, ...]] = {}
    for parts in _linears(config).values():
        for name, rows in parts.rows.items():
            layer[f"{name}.weight"] = (rows, parts.columns)
            if parts.has_bias:
                layer[f"{name}.bias"] = (rows,)
    layer |= {f"{name}.weight": (size,) for name, size in _norms(config).values()}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _linears(config: ModelConfig) -> dict[str, _Parts]:
    """By field of ``DecoderLayer``."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    qkv = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
    gate_up = {"mlp.gate_proj": inner, "mlp.up_proj": inner}
    if config.fused_projections:
        qkv = {"self_attn.qkv_proj": sum(qkv.values())}
        gate_up = {"mlp.gate_up_proj": sum(gate_up.values())}
    return {
        "qkv": _Parts(qkv, hidden, config.qkv_bias),
        "o": _Parts({"self_attn.o_proj": hidden}, q_size, config.o_bias),
        "gate_up": _Parts(gate_up, hidden, config.mlp_bias),
        "down": _Parts({"mlp.down_proj": hidden}, inner, config.mlp_bias),
    }


def _norms(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """By field of ``DecoderLayer``: name in the checkpoint, and size."""
    hidden, head_dim = config.hidden_size, config.head_dim
    norms = {"input_norm": ("input_layernorm", hidden)}
    if config.has_output_norms:
        # What is the MLP's input norm in Llama has the name of attention's output norm here.
        norms |= {
            "attention_out_norm": ("post_attention_layernorm", hidden),
            "mlp_norm": ("pre_feedforward_layernorm", hidden),
            "mlp_out_norm": ("post_feedforward_layernorm", hidden),
        }
    else:
        norms["mlp_norm"] = ("post_attention_layernorm", hidden)
    if config.qk_norm:
        norms |= {
            "q_norm": ("self_attn.q_norm", head_dim),
            "k_norm": ("self_attn.k_norm", head_dim),
        }
    return norms


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
