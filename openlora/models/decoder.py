"""The decoder of every supported model, over paged KV and paged LoRA.

Llama's is the plain form; what other families add to it (``ModelConfig`` lists it) is either a
weight that exists or not, or the business of the step's operations (``ops.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from openlora.kernels.linear import Linear
from openlora.models.config import ModelConfig
from openlora.models.ops import DOWN, OUT, QKV, DecoderOps
from openlora.models.rotary import inverse_frequencies
from openlora.models.weights import (
    GetWeight,
    MakeLinear,
    build_layer,
    norm_names,
    norm_weight,
)


class Decoder:
    """A decoder-only model.

    Attributes:
        config: its shape.
        dtype, device: of all weights.
        attention_backend: which attention runs, for logs and model info.
        rope_inv_freq: [rotary_dim / 2] fp32, angles per position.
        local_rope_inv_freq: the same for the sliding layers; None: they are as all others.
        norm_names: the checkpoint's name of each norm, by the address of its weight.
        base_weight: reads the checkpoint again, for adapters that need its weights on CPU; None:
            it cannot be read again. Set by who loads the model.

    Args:
        config: the shape.
        get: gives each tensor of the checkpoint once.
        dtype, device: what ``get`` delivers.
        make_linear: what the layers' linears are made of.
        progress: called with (layers built, layers) along the way.
    """

    def __init__(
        self,
        config: ModelConfig,
        get: GetWeight,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
        make_linear: MakeLinear = Linear,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.attention_backend = "torch"
        self._embedding = get("model.embed_tokens.weight")
        layers = []
        for index in range(config.num_layers):
            layers.append(build_layer(config, index, get, make_linear))
            if progress is not None:
                progress(index + 1, config.num_layers)
        self._layers = tuple(layers)
        self._norm = norm_weight(config, get("model.norm.weight"))
        self.norm_names = {self._norm.data_ptr(): "model.norm"}
        for index, layer in enumerate(self._layers):
            self.norm_names |= norm_names(config, index, layer)
        self.base_weight: GetWeight | None = None
        head = self._embedding if config.tie_word_embeddings else get("lm_head.weight")
        self._lm_head = make_linear(head, None)
        # Rounded to the model's dtype, as in training.
        root = float(torch.tensor(config.hidden_size**0.5).to(dtype))
        self._embedding_scale = root if config.scale_embeddings else 1.0
        self.rope_inv_freq = self._inverse_frequencies()
        self.local_rope_inv_freq: torch.Tensor | None = None
        if config.local_rope_theta is not None:
            self.local_rope_inv_freq = inverse_frequencies(
                config.rotary_dim, config.local_rope_theta, None
            ).to(device)

    def limit_context(self, max_model_len: int) -> None:
        """Serve contexts of at most so many positions; before anything is bound to the model.

        LongRoPE then has the frequencies of that length, and a window as wide is none.
        """
        self.config = self.config.limited_to(max_model_len)
        self.rope_inv_freq = self._inverse_frequencies()

    def _inverse_frequencies(self) -> torch.Tensor:
        config = self.config
        return inverse_frequencies(
            config.rotary_dim, config.rope_theta, config.rope_scaling, config.max_model_len
        ).to(self.device)

    def forward(
        self, token_ids: torch.Tensor, ops: DecoderOps, num_layers: int | None = None
    ) -> torch.Tensor:
        """Hidden states before the final norm; writes the step's KV through ``ops``.

        Args:
            token_ids: [tokens] int64.
            ops: the step's operations.
            num_layers: the first so many alone, for a warm-up; None: all.

        Returns:
            [tokens, hidden].
        """
        residual = ops.embed(self._embedding, token_ids, self._embedding_scale)
        x = ops.rms_norm(residual, self._layers[0].input_norm)
        mlp = residual
        for index, layer in enumerate(self._layers[:num_layers]):
            if index:
                x = ops.add_rms_norm(mlp, residual, layer.input_norm)
            qkv = ops.lora_linear(layer.qkv, x, index, QKV)
            if layer.q_norm is not None and layer.k_norm is not None:
                ops.norm_heads(qkv, layer.q_norm, layer.k_norm)
            attended = ops.lora_linear(layer.o, ops.attention(qkv, index), index, OUT)
            if layer.attention_out_norm is not None:
                attended = ops.rms_norm(attended, layer.attention_out_norm)
            x = ops.add_rms_norm(attended, residual, layer.mlp_norm)
            inner = ops.gated_linear(layer.gate_up, x, index, self.config.hidden_act)
            mlp = ops.lora_linear(layer.down, inner, index, DOWN)
            if layer.mlp_out_norm is not None:
                mlp = ops.rms_norm(mlp, layer.mlp_out_norm)
        return ops.add(mlp, residual)

    def logits(self, hidden: torch.Tensor, ops: DecoderOps) -> torch.Tensor:
        """[rows, vocab] logits of hidden states from ``forward``, in the model's dtype."""
        logits = ops.linear(self._lm_head, ops.rms_norm(hidden, self._norm))
        cap = self.config.logits_soft_cap
        return ops.soft_cap(logits, cap) if cap else logits
