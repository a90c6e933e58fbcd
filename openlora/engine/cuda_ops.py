"""The decoder's operations on Triton kernels, bound to one step or to one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openlora.kernels import triton_attention, triton_fused, triton_prefill_attention
from openlora.kernels.activation import gelu_tanh_and_mul
from openlora.kernels.linear import Linear
from openlora.kernels.norms import norm_heads
from openlora.kernels.triton_sgmv import SGMVTables, SGMVTiles, sgmv_expand, sgmv_shrink
from openlora.models.config import ModelConfig
from openlora.models.ops import EdgeOps, LayerPages


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


def scratch_elements(pages: Sequence[LayerPages], tiles: Sequence[SGMVTiles], h_rows: int) -> int:
    """Elements of ``LoRABinding.h`` for plans of up to ``h_rows`` rows."""
    return max(
        cut.splits * h_rows * site[0][0].shape[2] for site, cut in zip(pages, tiles, strict=True)
    )


@dataclass(frozen=True, slots=True)
class AttentionBinding:
    """What attention reads, on the device.

    Attributes:
        num_decodes: leading rows of one token each; they go through the decode kernel.
        block_tables: int32 [rows, blocks].
        context_lens: int32 [at least num_decodes].
        scratch: of the decode kernel.
        spans, tiles: of the other rows, as ``prefill_attention`` takes them.
    """

    num_decodes: int
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    scratch: triton_attention.DecodeScratch
    spans: torch.Tensor
    tiles: torch.Tensor


@dataclass(frozen=True, slots=True)
class CudaOps(EdgeOps):
    """``DecoderOps`` in Triton; the dense matmuls are cuBLAS's.

    Attributes:
        config: the model's.
        positions, slots: int32 [tokens], as ``rope_and_write_kv`` takes them.
        inv_freq: [head_dim / 2] fp32.
        kv_layers: per layer its cache.
        attention_binding: what attention reads.
        lora: None: no row of the step has pages, and no LoRA kernel is launched.
    """

    config: ModelConfig
    positions: torch.Tensor
    slots: torch.Tensor
    inv_freq: torch.Tensor
    kv_layers: Sequence[torch.Tensor]
    attention_binding: AttentionBinding
    lora: LoRABinding | None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return triton_fused.rms_norm(x, weight, self.config.rms_norm_eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        return triton_fused.add_rms_norm(x, residual, weight, self.config.rms_norm_eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return triton_fused.silu_and_mul(gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gelu_tanh_and_mul(gate_up)

    def norm_heads(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> None:
        config = self.config
        heads = qkv.view(qkv.shape[0], -1, config.head_dim)
        norm_heads(heads, q_norm, k_norm, config.num_kv_heads, config.rms_norm_eps)

    def lora_linear(self, linear: Linear, x: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        lora = self.lora
        if lora is None:
            return linear(x)
        a, b = lora.pages[site][layer]
        tiles = lora.tiles[site]
        width = a.shape[2]
        h = lora.h[: tiles.splits * lora.h_rows * width].view(tiles.splits, lora.h_rows, width)
        # Shrink first: it starts while the kernel that makes x drains, which a matmul cannot.
        sgmv_shrink(x, a, lora.plan, h, site=site, tiles=tiles)
        out = linear(x)
        sgmv_expand(h, b, lora.plan, out, site=site, tiles=tiles)
        return out

    def attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        config, binding, cache = self.config, self.attention_binding, self.kv_layers[layer]
        heads = qkv.view(qkv.shape[0], -1, config.head_dim)
        triton_fused.rope_and_write_kv(heads, self.positions, self.inv_freq, cache, self.slots)
        q = heads[:, : config.num_heads]
        out = qkv.new_empty(qkv.shape[0], config.num_heads * config.head_dim)
        scale = config.head_dim**-0.5
        num_decodes = binding.num_decodes
        if num_decodes:
            triton_attention.decode_attention(
                q[:num_decodes],
                cache,
                binding.block_tables,
                binding.context_lens,
                scale,
                binding.scratch,
                out[:num_decodes],
            )
        triton_prefill_attention.prefill_attention(
            q, cache, binding.block_tables, binding.spans, binding.tiles, scale, out
        )
        return out


def decode_tiles(pages: Sequence[LayerPages], num_processors: int) -> tuple[SGMVTiles, ...]:
    """Per site, how SGMV is cut for a batch of decodes: bytes bound, few rows a segment."""
    return tuple(
        SGMVTiles(
            chunk_rows=16,
            # About one tile of 256 × 16 a program: all of its loads are under way at once.
            splits=32 if site[0][0].shape[1] > 8192 else 16,
            shared_splits=8 if site[0][0].shape[1] > 8192 else 4,
            block_k=256,
            block_n=256,
            num_programs=num_processors * 16,
            shrink_warps=2,
            expand_warps=1,
        )
        for site in pages
    )


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
        )
        for site in pages
    )
