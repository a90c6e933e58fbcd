"""Paged attention by the flash-attn libraries, over this project's KV cache without a copy.

A layer's cache is [2, num_blocks, num_kv_heads, block_size, head_dim]; the libraries read K and V
as [num_blocks, block_size, num_kv_heads, head_dim] of any strides. Nothing here imports them: the
caller hands over the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Chunks:
    """Sequences of which a step computes several tokens each, on the device.

    Attributes:
        query_starts: int32 [rows + 1], first token of each row and the end of the last; it need
            not begin at 0.
        context_lens: int32 [rows], cached positions, the chunk's own included.
        context_starts: int32 [rows + 1], their running sum; only the differences count.
        block_tables: int32 [rows, blocks].
        max_tokens: of one row, at least 2.
    """

    query_starts: torch.Tensor
    context_lens: torch.Tensor
    context_starts: torch.Tensor
    block_tables: torch.Tensor
    max_tokens: int


class FlashAttention(Protocol):
    """Attention of a library; ``window`` and ``soft_cap`` as for ``decode_attention``."""

    name: str

    def prefill(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        chunks: Chunks,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        """Causal attention of the chunks over their own sequence's cached positions.

        Args:
            q: [tokens, num_heads, head_dim], rotated; the token stride is free.
            kv_cache: one layer; the chunks' own k and v are written already.
            scale: usually 1/√head_dim.

        Returns:
            A new [tokens, num_heads, head_dim]; rows of tokens of no chunk hold anything.
        """

    def decode(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        """Attention of one query per sequence; may be captured in a CUDA graph.

        Args:
            q: [rows, num_heads, head_dim].
            block_tables: int32 [rows, blocks].
            context_lens: int32 [rows]; 0: a row of padding, whose result holds anything.

        Returns:
            A new [rows, num_heads, head_dim].
        """


class FlashAttention4:
    """flash-attn-4 (CuTe DSL), which compiles a kernel when one of its kind is first called.

    Args:
        module: ``flash_attn.cute``.
    """

    name = "flash-attn-4"
    _MANY = 1024
    """A bound on a chunk's tokens that all steps share: kernels for few tokens are others, and one
    compiled in the middle of serving would hold up every stream."""

    def __init__(self, module: Any) -> None:
        self._attend = module.flash_attn_varlen_func

    def prefill(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        chunks: Chunks,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        k, v = paged_views(kv_cache)
        result = self._attend(
            q,
            k,
            v,
            cu_seqlens_q=chunks.query_starts,
            max_seqlen_q=max(chunks.max_tokens, self._MANY),
            seqused_k=chunks.context_lens,
            page_table=chunks.block_tables,
            softmax_scale=scale,
            causal=True,
            window_size=(window - 1, 0) if window else (None, None),
            softcap=soft_cap,
        )
        return _without_lse(result)

    def decode(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        k, v = paged_views(kv_cache)
        result = self._attend(
            q.unsqueeze(1),
            k,
            v,
            seqused_k=context_lens,
            page_table=block_tables,
            softmax_scale=scale,
            causal=True,
            window_size=(window - 1, 0) if window else (None, None),
            softcap=soft_cap,
        )
        return _without_lse(result).squeeze(1)


class FlashAttention2:
    """flash-attn 2, compiled CUDA; its paged cache takes blocks of a multiple of 256.

    Args:
        module: ``flash_attn``.
    """

    name = "flash-attn-2"

    def __init__(self, module: Any) -> None:
        self._attend = module.flash_attn_varlen_func
        self._attend_cache = module.flash_attn_with_kvcache

    def prefill(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        chunks: Chunks,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        k, v = paged_views(kv_cache)
        return _without_lse(
            self._attend(
                q,
                k,
                v,
                cu_seqlens_q=chunks.query_starts,
                cu_seqlens_k=chunks.context_starts,
                max_seqlen_q=chunks.max_tokens,
                # A bound, for the lengths themselves are on the device.
                max_seqlen_k=chunks.block_tables.shape[1] * kv_cache.shape[3],
                softmax_scale=scale,
                causal=True,
                window_size=(window - 1, 0) if window else (-1, -1),
                softcap=soft_cap,
                block_table=chunks.block_tables,
            )
        )

    def decode(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        k, v = paged_views(kv_cache)
        result = self._attend_cache(
            q.unsqueeze(1),
            k,
            v,
            cache_seqlens=context_lens,
            block_table=block_tables,
            softmax_scale=scale,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
            softcap=soft_cap,
        )
        return _without_lse(result).squeeze(1)


def paged_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a layer as [num_blocks, block_size, num_kv_heads, head_dim], nothing copied."""
    k, v = kv_cache.transpose(2, 3)
    return k, v


def _without_lse(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Versions differ in whether they return the log-sum-exp as well."""
    return result if isinstance(result, torch.Tensor) else result[0]
