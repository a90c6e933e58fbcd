"""The Llama decoder over paged KV and paged LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from openlora.kernels.linear import Linear
from openlora.kernels.rope import inverse_frequencies
from openlora.models.config import ModelConfig
from openlora.models.ops import DecoderOps

GetWeight = Callable[[str], torch.Tensor]
"""The named tensor of a checkpoint, in the target dtype and on the target device."""

QKV, OUT, GATE_UP, DOWN = range(4)
"""Places of ``SITES`` that a layer's linears are."""


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """Weights of one decoder layer; q, k, v and gate, up are fused."""

    input_norm: torch.Tensor
    qkv: Linear
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class LlamaModel:
    """A decoder of the Llama family.

    Attributes:
        config: its shape.
        dtype, device: of all weights.
        attention_backend: which attention runs, for logs and model info.
        rope_inv_freq: [head_dim / 2] fp32, angles per position.

    Args:
        config: the shape.
        get: gives each tensor of the checkpoint once.
        dtype, device: what ``get`` delivers.
        progress: called with (layers built, layers) along the way.
    """

    def __init__(
        self,
        config: ModelConfig,
        get: GetWeight,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.attention_backend = "torch"
        self._embedding = get("model.embed_tokens.weight")
        layers = []
        for index in range(config.num_layers):
            layers.append(_build_layer(f"model.layers.{index}.", get))
            if progress is not None:
                progress(index + 1, config.num_layers)
        self._layers = tuple(layers)
        self._norm = get("model.norm.weight")
        head = self._embedding if config.tie_word_embeddings else get("lm_head.weight")
        self._lm_head = Linear(head)
        self.rope_inv_freq = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling
        ).to(device)

    def forward(self, token_ids: torch.Tensor, ops: DecoderOps) -> torch.Tensor:
        """Hidden states before the final norm; writes the step's KV through ``ops``.

        Args:
            token_ids: [tokens] int64.
            ops: the step's operations.

        Returns:
            [tokens, hidden].
        """
        residual = F.embedding(token_ids, self._embedding)
        x = ops.rms_norm(residual, self._layers[0].input_norm)
        mlp = residual
        for index, layer in enumerate(self._layers):
            if index:
                x = ops.add_rms_norm(mlp, residual, layer.input_norm)
            attended = ops.attention(ops.lora_linear(layer.qkv, x, index, QKV), index)
            attended = ops.lora_linear(layer.o, attended, index, OUT)
            x = ops.add_rms_norm(attended, residual, layer.post_norm)
            inner = ops.silu_and_mul(ops.lora_linear(layer.gate_up, x, index, GATE_UP))
            mlp = ops.lora_linear(layer.down, inner, index, DOWN)
        return residual.add_(mlp)

    def logits(self, hidden: torch.Tensor, ops: DecoderOps) -> torch.Tensor:
        """[rows, vocab] logits of hidden states from ``forward``, in the model's dtype."""
        return self._lm_head(ops.rms_norm(hidden, self._norm))


def _build_layer(prefix: str, get: GetWeight) -> LlamaLayer:
    def fused(*names: str) -> Linear:
        return Linear(torch.cat([get(f"{prefix}{name}.weight") for name in names]))

    return LlamaLayer(
        input_norm=get(prefix + "input_layernorm.weight"),
        qkv=fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o=fused("self_attn.o_proj"),
        post_norm=get(prefix + "post_attention_layernorm.weight"),
        gate_up=fused("mlp.gate_proj", "mlp.up_proj"),
        down=fused("mlp.down_proj"),
    )


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this shape must hold."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q_size, hidden),
            prefix + "self_attn.k_proj.weight": (kv_size, hidden),
            prefix + "self_attn.v_proj.weight": (kv_size, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q_size),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    return shapes
