"""The operations a decoder is made of, bound to one step: what a device swaps for its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from openlora.kernels.activation import silu_and_mul
from openlora.kernels.attention import AttentionPlan, paged_attention
from openlora.kernels.kv_write import rope_and_write_kv
from openlora.kernels.linear import Linear
from openlora.kernels.norms import add_rms_norm, rms_norm
from openlora.kernels.sgmv import LoRAPlan, sgmv
from openlora.models.config import ModelConfig

LayerPages = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(A, B) of one site, one entry per layer; see ``SitePageTensors.layers``."""


class DecoderOps(Protocol):
    """One step's operations. Shapes: x is [tokens, features], in the model's dtype."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A new tensor; see ``kernels.norms``."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Adds x to residual in place; a new tensor with its norm."""

    def lora_linear(self, linear: Linear, x: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        """linear(x) plus the LoRA updates of each row; ``site`` indexes ``SITES``."""

    def attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        """Rotates q and k (qkv may be changed), writes the KV cache, attends over it.

        qkv: [tokens, (num_heads + 2 · num_kv_heads) · head_dim]; returns
        [tokens, num_heads · head_dim].
        """

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SiLU of the first half times the second."""


@dataclass(frozen=True, slots=True)
class TorchOps:
    """The operations in torch: CPU's, and the reference on any device.

    Attributes:
        config: the model's.
        cos, sin: from ``rope_cos_sin`` for the step's positions.
        slot_rows: from ``slot_rows_for``.
        attention_plan: from ``plan_attention``.
        kv_layers: per layer its KV cache.
        lora_plans: per site a plan; None where no row of the step has pages.
        lora_pages: per site its pages.
    """

    config: ModelConfig
    cos: torch.Tensor
    sin: torch.Tensor
    slot_rows: torch.Tensor
    attention_plan: AttentionPlan
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

    def attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        config = self.config
        num_heads = config.num_heads + 2 * config.num_kv_heads
        heads = qkv.view(qkv.shape[0], num_heads, config.head_dim)
        kv_cache = self.kv_layers[layer]
        rope_and_write_kv(heads, self.cos, self.sin, kv_cache, self.slot_rows)
        return paged_attention(
            heads[:, : config.num_heads], kv_cache, self.attention_plan, config.head_dim**-0.5
        )

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_and_mul(gate_up)
