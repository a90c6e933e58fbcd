"""A step's operations with the extras of single rows patched in, over any other operations.

DoRA, biases, LoRA on embeddings and head, and whole weights cost only the rows of adapters that
have them: every operation runs for the whole batch as without, and their rows are put right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from openlora.adapters.extras import AdapterExtras
from openlora.engine.extra_math import TORCH_MATH, ExtraMath
from openlora.kernels.linear import Linear
from openlora.models.config import ModelConfig
from openlora.models.decoder import Decoder
from openlora.models.ops import GATE_UP, DecoderOps, EdgeOps


@dataclass(frozen=True, slots=True)
class ExtraRows:
    """Rows ``start``..``end`` of a step are of one adapter with extras."""

    start: int
    end: int
    extras: AdapterExtras


@dataclass(frozen=True, slots=True)
class ExtraOps(EdgeOps):
    """``DecoderOps`` that run as ``inner`` and then put the rows of ``segments`` right.

    Attributes:
        inner: operations for all rows; none that are recorded for later.
        config: the model's.
        norm_names: the checkpoint's name of a norm's weight, by the weight's address.
        segments: rows with extras.
        math: how their own parts are computed.
    """

    inner: DecoderOps
    config: ModelConfig
    norm_names: Mapping[int, str]
    segments: Sequence[ExtraRows]
    math: ExtraMath = TORCH_MATH

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor, scale: float) -> torch.Tensor:
        last = table.shape[0] - 1
        known = token_ids.clamp(max=last) if self._num_added() else token_ids
        out = self.inner.embed(table, known, scale)
        for rows, extras in self._rows():
            extra = extras.embedding
            if extra is None:
                continue
            ids = token_ids[rows]
            own = F.embedding(known[rows], table if extra.weight is None else extra.weight)
            if extra.added is not None:
                is_added = ids > last
                own[is_added] = F.embedding(ids[is_added] - table.shape[0], extra.added)
            if extra.a is not None and extra.b is not None:
                own = self.math.add_product(own, F.embedding(ids, extra.a), extra.b)
            out[rows] = own.mul_(scale)
        return out

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """The head's: it is the one linear that goes without LoRA pages.

        Where an adapter of any row has added tokens, there are columns for them, -inf for others.
        """
        out = self.inner.linear(linear, x)
        vocab = out.shape[1]
        if num_added := self._num_added():
            out = F.pad(out, (0, num_added), value=-torch.inf)
        for rows, extras in self._rows():
            extra = extras.head
            if extra is None:
                continue
            if extra.weight is not None:
                out[rows, :vocab] = self.math.product(x[rows], extra.weight)
            if extra.added is not None:
                added = self.math.product(x[rows], extra.added)
                out[rows, vocab : vocab + len(extra.added)] = added
            if extra.a is not None and extra.b is not None:
                shrunk = self.math.product(x[rows], extra.a.t())
                out[rows, : extra.b.shape[1]] += self.math.product(shrunk, extra.b.t())
        return out

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.inner.add(x, residual)

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        if not self._num_added():
            return self.inner.soft_cap(x, cap)
        is_absent = x == -torch.inf
        return self.inner.soft_cap(x, cap).masked_fill_(is_absent, -torch.inf)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._renormed(self.inner.rms_norm(x, weight), x, weight)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        return self._renormed(self.inner.add_rms_norm(x, residual, weight), residual, weight)

    def lora_linear(self, linear: Linear, x: torch.Tensor, layer: int, site: int) -> torch.Tensor:
        out = self.inner.lora_linear(linear, x, layer, site)
        for rows, extras in self._rows():
            extra = extras.linears.get((layer, site))
            if extra is None:
                continue
            if extra.gain is not None:
                base = linear(x[rows])
                if linear.bias is not None:
                    base -= linear.bias
                out[rows] += base * extra.gain
            if extra.bias is not None:
                out[rows] += extra.bias
        return out

    def gated_linear(
        self, linear: Linear, x: torch.Tensor, layer: int, activation: str
    ) -> torch.Tensor:
        if any((layer, GATE_UP) in segment.extras.linears for segment in self.segments):
            return EdgeOps.gated_linear(self, linear, x, layer, activation)
        return self.inner.gated_linear(linear, x, layer, activation)

    def norm_heads(self, qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> None:
        config = self.config
        own = []
        for rows, extras in self._rows():
            q, k = self._weight(extras, q_norm), self._weight(extras, k_norm)
            if q is not None or k is not None:
                own.append((rows, qkv[rows].clone(), q_norm if q is None else q, k))
        self.inner.norm_heads(qkv, q_norm, k_norm)
        for rows, part, q, k in own:
            heads = part.view(part.shape[0], -1, config.head_dim)
            k = k_norm if k is None else k
            self.math.norm_heads(heads, q, k, config.num_kv_heads, config.rms_norm_eps)
            qkv[rows] = part

    def attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        return self.inner.attention(qkv, layer)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.inner.silu_and_mul(gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.inner.gelu_tanh_and_mul(gate_up)

    def _num_added(self) -> int:
        return max((segment.extras.num_added for segment in self.segments), default=0)

    def _rows(self) -> list[tuple[slice, AdapterExtras]]:
        return [(slice(s.start, s.end), s.extras) for s in self.segments]

    def _weight(self, extras: AdapterExtras, weight: torch.Tensor) -> torch.Tensor | None:
        return extras.norms.get(self.norm_names[weight.data_ptr()]) if extras.norms else None

    def _renormed(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for rows, extras in self._rows():
            own = self._weight(extras, weight)
            if own is not None:
                out[rows] = self.math.rms_norm(x[rows], own, self.config.rms_norm_eps)
        return out


def with_extras(
    inner: DecoderOps,
    model: Decoder,
    rows: Sequence[tuple[int, AdapterExtras | None]],
    math: ExtraMath = TORCH_MATH,
) -> DecoderOps:
    """``inner``, and around it ``ExtraOps`` if any row has extras.

    Args:
        rows: (tokens, extras) of each row, in the order of what the operations run on.
        math: as ``ExtraOps.math``.
    """
    segments: list[ExtraRows] = []
    start = 0
    for num_tokens, extras in rows:
        end = start + num_tokens
        last = segments[-1] if segments else None
        if extras is not None and last and (last.end, last.extras) == (start, extras):
            segments[-1] = ExtraRows(last.start, end, extras)
        elif extras is not None:
            segments.append(ExtraRows(start, end, extras))
        start = end
    if not segments:
        return inner
    return ExtraOps(inner, model.config, model.norm_names, segments, math)
