"""What attention reads in a step on a GPU, and which kernels it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openlora.engine.attention_backends import TRITON_ATTENTION, AttentionChoice
from openlora.kernels.flash_attention import Chunks
from openlora.kernels.invariant_splits import UnitRows, invariant_tile_tokens
from openlora.kernels.triton_attention import DecodeScratch, decode_attention, decode_splits
from openlora.kernels.triton_invariant_attention import invariant_attention
from openlora.kernels.triton_prefill_attention import prefill_attention, prefill_tile_tokens
from openlora.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class AttentionBinding:
    """What attention reads, on the device.

    Attributes:
        num_decodes: leading rows of one token each.
        block_tables: int32 [rows, blocks].
        context_lens: int32 [at least num_decodes; all rows in a deterministic step].
        scratch: of the decodes; its kind says which kernels run.
        spans, tiles: of the other rows, as ``prefill_attention`` takes them.
        chunks: the other rows, as a library takes them; None: there are none, or none is chosen.
        choice: what computes; with a deterministic ``scratch`` no library.
    """

    num_decodes: int
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    scratch: DecodeScratch | UnitRows
    spans: torch.Tensor
    tiles: torch.Tensor
    chunks: Chunks | None = None
    choice: AttentionChoice = TRITON_ATTENTION

    @classmethod
    def of_decodes(
        cls,
        *,
        num_decodes: int,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        scratch: DecodeScratch | UnitRows,
        choice: AttentionChoice = TRITON_ATTENTION,
    ) -> AttentionBinding:
        """Of a step without chunks."""
        none = block_tables.new_empty(0, 2)
        return cls(num_decodes, block_tables, context_lens, scratch, none, none, choice=choice)

    def attend(
        self, q: torch.Tensor, cache: torch.Tensor, scale: float, *, window: int, soft_cap: float
    ) -> torch.Tensor:
        """Causal attention of a step's tokens over their own sequence's cached positions.

        Args:
            q: [tokens, num_heads, head_dim], rotated; the token stride is free.
            cache: one layer; the step's own k and v are written already.
            scale, window, soft_cap: see the kernels.

        Returns:
            A new [tokens, num_heads · head_dim].
        """
        width = q.shape[1] * q.shape[2]
        if isinstance(self.scratch, UnitRows):
            out = q.new_empty(q.shape[0], width)
            self._attend_invariantly(self.scratch, q, cache, scale, out, window, soft_cap)
            return out
        num_decodes, prefill, decode = self.num_decodes, self.choice.prefill, self.choice.decode
        if prefill is not None and self.chunks is not None:
            # Its result has room for the decodes' rows, which are added behind.
            out = prefill.prefill(q, cache, self.chunks, scale, window=window, soft_cap=soft_cap)
            out = out.view(-1, width)
        else:
            out = q.new_empty(q.shape[0], width)
            prefill_attention(
                q,
                cache,
                self.block_tables,
                self.spans,
                self.tiles,
                scale,
                out,
                window=window,
                soft_cap=soft_cap,
            )
        if not num_decodes:
            return out
        decodes, context_lens = q[:num_decodes], self.context_lens[:num_decodes]
        if decode is None:
            decode_attention(
                decodes,
                cache,
                self.block_tables,
                context_lens,
                scale,
                self.scratch,
                out[:num_decodes],
                window=window,
                soft_cap=soft_cap,
            )
            return out
        tables = self.block_tables[:num_decodes]
        decoded = decode.decode(
            decodes, cache, tables, context_lens, scale, window=window, soft_cap=soft_cap
        ).reshape(-1, width)
        if num_decodes == q.shape[0]:
            return decoded
        out[:num_decodes] = decoded
        return out

    def _attend_invariantly(
        self,
        scratch: UnitRows,
        q: torch.Tensor,
        cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        window: int,
        soft_cap: float,
    ) -> None:
        for rows, spans, tiles in (
            (self.num_decodes, None, None),
            (len(q), self.spans, self.tiles),
        ):
            invariant_attention(
                q[:rows],
                cache,
                self.block_tables,
                self.context_lens,
                spans,
                tiles,
                scale,
                scratch,
                out[:rows],
                window=window,
                soft_cap=soft_cap,
            )


def attention_scratch(
    config: ModelConfig,
    rows: int,
    *,
    num_processors: int,
    max_model_len: int,
    device: torch.device,
    deterministic: bool,
) -> DecodeScratch | UnitRows:
    """``AttentionBinding.scratch`` for launches of up to ``rows`` decodes."""
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    parts = decode_splits(rows, config.num_kv_heads, num_processors, max_model_len)
    if deterministic:
        return UnitRows(rows, *heads, max_model_len, parts, device)
    return DecodeScratch(rows, *heads, parts, device)


def tile_tokens(config: ModelConfig, *, deterministic: bool) -> int:
    """Tokens of a query tile of ``AttentionBinding.tiles``."""
    of = invariant_tile_tokens if deterministic else prefill_tile_tokens
    return of(config.num_heads, config.num_kv_heads)
