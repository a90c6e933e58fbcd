"""What attention reads in a step on a GPU, and which kernels it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openlora.engine.attention_backends import TRITON_ATTENTION, AttentionChoice
from openlora.kernels.flash_attention import Chunks
from openlora.kernels.triton_attention import DecodeScratch, decode_attention
from openlora.kernels.triton_prefill_attention import prefill_attention


@dataclass(frozen=True, slots=True)
class AttentionBinding:
    """What attention reads, on the device.

    Attributes:
        num_decodes: leading rows of one token each.
        block_tables: int32 [rows, blocks].
        context_lens: int32 [at least num_decodes].
        scratch: of the Triton decode kernel.
        spans, tiles: of the other rows, as ``prefill_attention`` takes them.
        chunks: the other rows, as a library takes them; None: there are none, or none is chosen.
        choice: what computes.
    """

    num_decodes: int
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    scratch: DecodeScratch
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
        scratch: DecodeScratch,
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
