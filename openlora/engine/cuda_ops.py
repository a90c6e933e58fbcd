"""The decoder's operations on Triton kernels, bound to one step or to one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openlora.engine.attention_binding import AttentionBinding
from openlora.kernels import triton_activation, triton_norms, triton_rope
from openlora.kernels.linear import Linear
from openlora.kernels.triton_sgmv import SGMVTables, SGMVTiles, sgmv_shrink
from openlora.kernels.triton_sgmv_expand import sgmv_expand
from openlora.kernels.triton_sgmv_gated import sgmv_expand_gated
from openlora.models.config import ModelConfig
from openlora.models.decoder import Decoder
from openlora.models.ops import GATE_UP, EdgeOps, LayerPages


@dataclass(frozen=True, slots=True)
class LoRABinding:
    """The LoRA work of a step.

    Attributes:
        plan: the step's ``SGMVPlan`` on the device.
        pages: per site (A, B) of every layer.
        h: fp32 [elements], scratch between shrink and expand; see ``scratch_elements``.
        h_rows: rows of ``h`` in each split, at least the plan's.
        tiles: per site how the kernels are cut.
    """

    plan: SGMVTables
    pages: Sequence[LayerPages]
    h: torch.Tensor
    h_rows: int
    tiles: Sequence[SGMVTiles]

    def shrink(self, x: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        """x through the A of each row's pages; a part of ``h``."""
        a, tiles = self.pages[site][layer][0], self.tiles[site]
        width = a.shape[2]
        h = self.h[: tiles.splits * self.h_rows * width].view(tiles.splits, self.h_rows, width)
        sgmv_shrink(x, a, self.plan, h, site=site, tiles=tiles)
        return h


def scratch_elements(pages: Sequence[LayerPages], tiles: Sequence[SGMVTiles], h_rows: int) -> int:
    """Elements of ``LoRABinding.h`` for plans of up to ``h_rows`` rows."""
    return max(
        cut.splits * h_rows * site[0][0].shape[2] for site, cut in zip(pages, tiles, strict=True)
    )


@dataclass(frozen=True, slots=True)
class RotaryBinding:
    """Angles of the rotary embedding.

    Attributes:
        inv_freq: [rotary_dim / 2] fp32.
        factor: multiplies cos and sin.
        local_inv_freq: of the sliding layers, whose factor is 1; None: as all others.
    """

    inv_freq: torch.Tensor
    factor: float
    local_inv_freq: torch.Tensor | None

    @classmethod
    def of(cls, model: Decoder) -> RotaryBinding:
        """The model's."""
        scaling = model.config.rope_scaling
        factor = 1.0 if scaling is None else scaling.attention_factor
        return cls(model.rope_inv_freq, factor, model.local_rope_inv_freq)


@dataclass(frozen=True, slots=True)
class CudaOps(EdgeOps):
    """``DecoderOps`` in Triton; the dense matmuls are the model's linears', usually cuBLAS's.

    Attributes:
        config: the model's.
        positions, slots: int32 [tokens], as ``rope_and_write_kv`` takes them.
        rotary: the model's angles.
        kv_layers: per layer its cache.
        attention_binding: what attention reads.
        lora: None: no row of the step has pages, and no LoRA kernel is launched.
        logits: [at least the sampled rows, vocab], where the head writes; None: to new memory.
    """

    config: ModelConfig
    positions: torch.Tensor
    slots: torch.Tensor
    rotary: RotaryBinding
    kv_layers: Sequence[torch.Tensor]
    attention_binding: AttentionBinding
    lora: LoRABinding | None
    logits: torch.Tensor | None = None

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(x) if self.logits is None else linear.into(x, self.logits[: x.shape[0]])

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return triton_norms.rms_norm(x, weight, self.config.rms_norm_eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        return triton_norms.add_rms_norm(x, residual, weight, self.config.rms_norm_eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return triton_activation.silu_and_mul(gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return triton_activation.gelu_tanh_and_mul(gate_up)

    def norm_heads(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> None:
        config = self.config
        heads = qkv.view(qkv.shape[0], -1, config.head_dim)
        triton_norms.norm_heads(heads, q_norm, k_norm, config.num_kv_heads, config.rms_norm_eps)

    def lora_linear(self, linear: Linear, x: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        lora = self.lora
        if lora is None:
            return linear(x)
        # Shrink first: it starts while the kernel that makes x drains, which a matmul cannot.
        h = lora.shrink(x, layer, site)
        out = linear(x)
        sgmv_expand(
            h, lora.pages[site][layer][1], lora.plan, out, site=site, tiles=lora.tiles[site]
        )
        return out

    def gated_linear(
        self, linear: Linear, x: torch.Tensor, layer: int, activation: str
    ) -> torch.Tensor:
        lora = self.lora
        if lora is None or not lora.tiles[GATE_UP].fuses_gate:
            activate = self.silu_and_mul if activation == "silu" else self.gelu_tanh_and_mul
            return activate(self.lora_linear(linear, x, layer, GATE_UP))
        h = lora.shrink(x, layer, GATE_UP)
        return sgmv_expand_gated(
            h,
            lora.pages[GATE_UP][layer][1],
            lora.plan,
            linear(x),
            site=GATE_UP,
            tiles=lora.tiles[GATE_UP],
            activation=activation,
        )

    def attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        config, binding, cache = self.config, self.attention_binding, self.kv_layers[layer]
        heads = qkv.view(qkv.shape[0], -1, config.head_dim)
        rotary = self.rotary
        local = rotary.local_inv_freq if config.is_sliding(layer) else None
        triton_rope.rope_and_write_kv(
            heads,
            self.positions,
            rotary.inv_freq if local is None else local,
            cache,
            self.slots,
            rotary.factor if local is None else 1.0,
        )
        return binding.attend(
            heads[:, : config.num_heads],
            cache,
            config.attention_scale,
            window=config.window(layer),
            soft_cap=config.attention_soft_cap,
        )


def decode_tiles(
    pages: Sequence[LayerPages],
    num_processors: int,
    *,
    rows_share: bool,
    has_chunks: bool = False,
    deterministic: bool = False,
) -> tuple[SGMVTiles, ...]:
    """Per site, how SGMV is cut for a batch of decodes: bytes bound, few rows a segment.

    ``rows_share``: most rows share their pages with others; ``has_chunks``: many of them, as those
    of prompts do. The tiles serve any batch; these are the faster ones for such.
    ``deterministic``: ``_invariant_tiles``, whatever the batch is.
    """
    if deterministic:
        return _invariant_tiles(pages, num_processors)
    tiles = []
    for index, site in enumerate(pages):
        is_long = site[0][0].shape[1] > 8192
        splits = 32 if is_long else 16
        tiles.append(
            SGMVTiles(
                chunk_rows=16,
                # About one tile of 256 × 16 a program: all of its loads are under way at once.
                splits=splits,
                shared_splits=splits if rows_share and not has_chunks else splits // 2,
                block_k=256,
                # Few shared pages make many programs of small tiles. Gate and up are wide, and the
                # kernel of both together reads a tile of each.
                block_n=128 if index == GATE_UP else 64 if rows_share else 256,
                num_programs=num_processors * 16,
                shrink_warps=2,
                # One warp holds all 16 ranks of its columns.
                expand_warps=1,
                fuses_gate=not rows_share,
            )
        )
    return tuple(tiles)


def _invariant_tiles(pages: Sequence[LayerPages], num_processors: int) -> tuple[SGMVTiles, ...]:
    """Per site, one cut for steps of any kind, prefill included, so that a row's sums have one
    order whatever shares its chunk or its step."""
    tiles = []
    for site in pages:
        splits = 16 if site[0][0].shape[1] > 8192 else 8
        tiles.append(
            SGMVTiles(
                chunk_rows=16,
                splits=splits,
                shared_splits=splits,
                block_k=256,
                block_n=256,
                num_programs=num_processors * 16,
                shrink_warps=2,
                expand_warps=2,
                fuses_gate=False,
                single_rows=False,
            )
        )
    return tuple(tiles)


def prefill_tiles(pages: Sequence[LayerPages], num_processors: int) -> tuple[SGMVTiles, ...]:
    """Per site, how SGMV is cut for steps with prefill chunks: many rows a segment."""
    return tuple(
        SGMVTiles(
            chunk_rows=64,
            splits=4 if site[0][0].shape[1] > 8192 else 2,
            shared_splits=4 if site[0][0].shape[1] > 8192 else 2,
            block_k=128,
            block_n=128,
            num_programs=num_processors * 16,
            shrink_stages=3,
        )
        for site in pages
    )
