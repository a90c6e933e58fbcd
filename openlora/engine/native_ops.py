"""The decoder's operations on the native CPU kernels, bound to one step or recorded for many."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from openlora.adapters.page_tensors import SitePageTensors
from openlora.kernels.attention import AttentionPlan, paged_attention
from openlora.kernels.linear import Linear
from openlora.kernels.native.library import (
    TYPES,
    Kind,
    NativeKernels,
    Op,
    Step,
    make_op,
)
from openlora.kernels.native.linear import NativeLinear
from openlora.models.config import ModelConfig
from openlora.models.ops import GATE_UP

_SILU, _GELU_TANH = 0, 1


@dataclass(frozen=True, slots=True)
class Chunks:
    """The step's prefill chunks, which lie behind its decode rows; torch attends for them.

    Attributes:
        num_decodes: rows before the first chunk.
        full, sliding: plans over the rows behind them, for layers without and with a window.
    """

    num_decodes: int
    full: AttentionPlan
    sliding: AttentionPlan


class Recorder:
    """Takes operations instead of running them, and keeps their tensors."""

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._tensors: list[object] = []

    def take(self, op: Op, tensors: Sequence[torch.Tensor | None]) -> None:
        """Note one operation."""
        self._ops.append(op)
        self._tensors.append(tensors)

    def __len__(self) -> int:
        """Operations so far."""
        return len(self._ops)

    def recorded(self) -> ctypes.Array[Op]:
        """All operations so far, as ``NativeKernels.run_all`` takes them."""
        return (Op * len(self._ops))(*self._ops)


@dataclass(frozen=True, slots=True)
class NativeParts:
    """What all steps share.

    Attributes:
        config: the model's.
        kernels: the compiled kernels.
        kv_layers: per layer its KV cache.
        sites: the LoRA pages.
        block_slices: int64 [blocks] of each site; see ``SiteShape``.
    """

    config: ModelConfig
    kernels: NativeKernels
    kv_layers: Sequence[torch.Tensor]
    sites: Sequence[SitePageTensors]
    block_slices: Sequence[torch.Tensor]


class NativeOps:
    """``DecoderOps`` on the native kernels; tensors are contiguous.

    Args:
        parts: what all steps share.
        step: what each operation runs on, its rows those of the tensors.
        chunks: the step's prefill chunks; None: it has decode rows alone.
        recorder: takes the operations instead of running them now; LoRA operations are recorded
            for every site that has pages, whatever ``step`` holds.
    """

    def __init__(
        self,
        parts: NativeParts,
        step: Step,
        chunks: Chunks | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._parts = parts
        self._config = parts.config
        self._step = step
        self._chunks = chunks
        self._recorder = recorder

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor, scale: float) -> torch.Tensor:
        """Token IDs come from the step; ``token_ids`` gives their number alone."""
        y = table.new_empty(token_ids.shape[0], table.shape[1])
        self._emit(Kind.EMBED, y, (table, y), (table.shape[1],), (scale,))
        return y

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        native = cast(NativeLinear, linear)
        y = x.new_empty(x.shape[0], native.out_features)
        tensors = (x, native.weight, native.bias, y)
        self._emit(Kind.LINEAR, x, tensors, (native.in_features, native.out_features, -1))
        return y

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        self._emit(Kind.ADD, x, (residual, x), (x.shape[1],))
        return residual

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        self._emit(Kind.SOFT_CAP, x, (x,), (x.shape[1],), (cap,))
        return x

    def greedy(self, logits: torch.Tensor) -> torch.Tensor:
        """int64 [rows]; as ``kernels.sampling.greedy``."""
        tokens = torch.empty(logits.shape[0], dtype=torch.int64)
        self._emit(Kind.GREEDY, logits, (logits, tokens), (logits.shape[1],))
        return tokens

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._norm(x, None, weight)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        return self._norm(x, residual, weight)

    def _norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        y = torch.empty_like(x)
        numbers = (x.shape[1], TYPES[weight.dtype])
        self._emit(Kind.NORM, x, (x, weight, y, residual), numbers, (self._config.rms_norm_eps,))
        return y

    def lora_linear(self, linear: Linear, x: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        native, pages = cast(NativeLinear, linear), self._parts.sites[site]
        is_recorded = self._recorder is not None and len(pages.a)
        if not (is_recorded or self._step.sites[site].num_tasks):
            return self.linear(linear, x)
        a, b = pages.layers[layer]
        y = x.new_empty(x.shape[0], native.out_features)
        sums = y if y.dtype is torch.float32 else torch.empty(y.shape, dtype=torch.float32)
        tensors = (x, native.weight, native.bias, y, b, self._parts.block_slices[site], a, sums)
        numbers = (
            *(native.in_features, native.out_features, site, b.stride(0), b.shape[3]),
            *(len(pages.shape.modules), a.stride(0), b.shape[1]),
        )
        for kind in (Kind.SHRINK, Kind.LINEAR, Kind.EXPAND):
            self._emit(kind, x, tensors, numbers)
        return y

    def gated_linear(
        self, linear: Linear, x: torch.Tensor, layer: int, activation: str
    ) -> torch.Tensor:
        gate_up = self.lora_linear(linear, x, layer, GATE_UP)
        return (
            self.silu_and_mul(gate_up) if activation == "silu" else self.gelu_tanh_and_mul(gate_up)
        )

    def norm_heads(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> None:
        config = self._config
        numbers = (config.num_heads, config.num_kv_heads, config.head_dim, TYPES[q_norm.dtype])
        self._emit(Kind.NORM_HEADS, qkv, (qkv, q_norm, k_norm), numbers, (config.rms_norm_eps,))

    def attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        config, cache = self._config, self._parts.kv_layers[layer]
        num_blocks, block_size = cache.shape[1], cache.shape[3]
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        is_local = config.is_sliding(layer)
        rope = (*heads, config.rotary_dim, num_blocks, block_size, int(is_local))
        self._emit(Kind.ROPE, qkv, (qkv, cache), rope)
        y = qkv.new_empty(qkv.shape[0], config.num_heads * config.head_dim)
        numbers = (*heads, num_blocks, block_size, config.window(layer))
        factors = (config.attention_scale, config.attention_soft_cap)
        chunks = self._chunks
        if chunks is None or chunks.num_decodes:
            self._emit(Kind.ATTENTION, qkv, (qkv, cache, y), numbers, factors)
        if chunks is not None:
            q = qkv.view(qkv.shape[0], -1, config.head_dim)[chunks.num_decodes :, : heads[0]]
            plan = chunks.sliding if is_local else chunks.full
            y[chunks.num_decodes :] = paged_attention(q, cache, plan, *factors)
        return y

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(gate_up, _SILU)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(gate_up, _GELU_TANH)

    def _gated(self, gate_up: torch.Tensor, activation: int) -> torch.Tensor:
        columns = gate_up.shape[1] // 2
        y = gate_up.new_empty(gate_up.shape[0], columns)
        self._emit(Kind.GATED, gate_up, (gate_up, y), (columns, activation))
        return y

    def _emit(
        self,
        kind: Kind,
        typed: torch.Tensor,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[int],
        factors: Sequence[float] = (),
    ) -> None:
        op = make_op(kind, typed.dtype, tensors, numbers, factors)
        if self._recorder is not None:
            self._recorder.take(op, tensors)
        else:
            self._parts.kernels.run(op, self._step)
