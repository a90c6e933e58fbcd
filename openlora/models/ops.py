"""The operations a decoder is made of, bound to one step: what a device swaps for its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from openlora.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from openlora.kernels.attention import AttentionPlan, paged_attention
from openlora.kernels.kv_write import rope_and_write_kv
from openlora.kernels.linear import Linear
from openlora.kernels.norms import add_rms_norm, norm_heads, rms_norm
from openlora.kernels.sgmv import LoRAPlan, sgmv
from openlora.models.config import ModelConfig

QKV, OUT, GATE_UP, DOWN = range(4)
"""Places of ``SITES`` that a layer's linears are."""

LayerPages = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(A, B) of one site, one entry per layer; see ``SitePageTensors.layers``."""


class DecoderOps(Protocol):
    """One step's operations. Shapes: x is [tokens, features], in the model's dtype."""

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor, scale: float) -> torch.Tensor:
        """Rows of ``table`` times ``scale``; token_ids: [tokens]."""

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """linear(x)."""

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Adds x to residual in place; returns residual."""

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """cap · tanh(x / cap), in place; returns x."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A new tensor; see ``kernels.norms``."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Adds x to residual in place; a new tensor with its norm."""

    def lora_linear(self, linear: Linear, x: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        """linear(x) plus the LoRA updates of each row; ``site`` indexes ``SITES``."""

    def norm_heads(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> None:
        """RMSNorm of each head of q and of k, in place; qkv as in ``attention``."""

    def attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        """Rotates q and k (qkv may be changed), writes the KV cache, attends over it.

        Window, soft cap and rotary embedding are those that the model's configuration gives the
        layer. qkv: [tokens, (num_heads + 2 · num_kv_heads) · head_dim]; returns
        [tokens, num_heads · head_dim].
        """

    def gated_linear(
        self, linear: Linear, x: torch.Tensor, layer: int, activation: str
    ) -> torch.Tensor:
        """act(gate) · up of the layer's gate and up with LoRA: [tokens, intermediate].

        activation: as ``ModelConfig.hidden_act``.
        """

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SiLU of the first half times the second."""

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """GELU (by tanh) of the first half times the second."""


class EdgeOps:
    """What happens before and behind the layers, in torch, and the MLP's first half, in steps.

    See ``DecoderOps``.
    """

    __slots__ = ()

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor, scale: float) -> torch.Tensor:
        out = F.embedding(token_ids, table)
        return out if scale == 1.0 else out.mul_(scale)

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(x)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(x)

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return x.div_(cap).tanh_().mul_(cap)

    def gated_linear(
        self: DecoderOps, linear: Linear, x: torch.Tensor, layer: int, activation: str
    ) -> torch.Tensor:
        gate_up = self.lora_linear(linear, x, layer, GATE_UP)
        if activation == "silu":
            return self.silu_and_mul(gate_up)
        return self.gelu_tanh_and_mul(gate_up)


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What attention of one kind of layers reads in a step.

    Attributes:
        cos, sin: from ``rope_cos_sin`` for the step's positions.
        plan: from ``plan_attention``.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    plan: AttentionPlan


@dataclass(frozen=True, slots=True)
class TorchOps(EdgeOps):
    """The operations in torch: CPU's, and the reference on any device.

    Attributes:
        config: the model's.
        slot_rows: from ``slot_rows_for``.
        full, sliding: what attention of layers without and with a window reads; only the kinds
            that the model has are used.
        kv_layers: per layer its KV cache.
        lora_plans: per site a plan; None where no row of the step has pages.
        lora_pages: per site its pages.
    """

    config: ModelConfig
    slot_rows: torch.Tensor
    full: AttentionInputs
    sliding: AttentionInputs
    kv_layers: Sequence[torch.Tensor]
    lora_plans: Sequence[LoRAPlan | None]
    lora_pages: Sequence[LayerPages]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self.config.rms_norm_eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        return add_rms_norm(x, residual, weight, self.config.rms_norm_eps)

    def lora_linear(self, linear: Linear, x: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        out = linear(x)
        plan = self.lora_plans[site]
        if plan is not None:
            sgmv(out, x, *self.lora_pages[site][layer], plan)
        return out

    def norm_heads(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> None:
        config = self.config
        norm_heads(self._heads(qkv), q_norm, k_norm, config.num_kv_heads, config.rms_norm_eps)

    def attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        config, kv_cache = self.config, self.kv_layers[layer]
        inputs = self.sliding if config.is_sliding(layer) else self.full
        heads = self._heads(qkv)
        rope_and_write_kv(heads, inputs.cos, inputs.sin, kv_cache, self.slot_rows)
        return paged_attention(
            heads[:, : config.num_heads],
            kv_cache,
            inputs.plan,
            config.attention_scale,
            config.attention_soft_cap,
        )

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_and_mul(gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gelu_tanh_and_mul(gate_up)

    def _heads(self, qkv: torch.Tensor) -> torch.Tensor:
        config = self.config
        num_heads = config.num_heads + 2 * config.num_kv_heads
        return qkv.view(qkv.shape[0], num_heads, config.head_dim)
