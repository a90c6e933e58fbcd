"""Attention over the paged KV cache: one query per sequence in decode, a chunk in prefill.

The cache of a layer is [2, num_blocks, num_kv_heads, block_size, head_dim]. A step's tokens lie in
one [tokens, …] tensor, decode sequences (one token each) first, prefill chunks behind them. The
plan is built once per step and serves every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode sequences of similar context length, padded to the longest of them.

    Attributes:
        rows: [n] int64, their rows of the step; None: all decode rows in order.
        kv_rows: [2 · n · num_kv_heads · padded_len] int64 rows of the cache as [-1, head_dim],
            K's before V's. Padding repeats a sequence's own first position: stale values
            elsewhere in the cache, which may be NaN, are never read.
        hidden: [n, 1, 1, padded_len] of the cache's dtype, -inf at the padding, else 0;
            None: no padding.
    """

    rows: torch.Tensor | None
    kv_rows: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One sequence's chunk.

    Attributes:
        start, end: its rows of the step.
        kv_pages: [2 · num_kv_heads · blocks] int64 rows of the cache as
            [-1, block_size · head_dim].
        context_len: cached positions, the chunk's own included.
        visible: [end - start, context_len] bool, lower right triangle; None: the chunk starts at
            position 0, plain causal.
    """

    start: int
    end: int
    kv_pages: torch.Tensor
    context_len: int
    visible: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attention of one step reads, for every layer alike."""

    num_tokens: int
    num_decodes: int
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]


def paged_attention(
    q: torch.Tensor, kv_cache: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Softmax(q Kᵀ · scale) V of every token over its own sequence's cached positions, causal.

    Args:
        q: [tokens, num_heads, head_dim], rotated; may be a strided view.
        kv_cache: one layer; the step's own k and v are written already.
        plan: from ``plan_attention``.
        scale: usually 1/√head_dim.

    Returns:
        A new [tokens, num_heads · head_dim] of q's dtype. Grouped queries: num_heads is a multiple
        of num_kv_heads, query head h reads kv head h // (num_heads / num_kv_heads).
    """
    num_heads, head_dim = q.shape[1], q.shape[2]
    if len(plan.groups) == 1 and not plan.chunks:
        return _decode(q, kv_cache, plan.groups[0], scale)
    out = q.new_empty(plan.num_tokens, num_heads * head_dim)
    for group in plan.groups:
        if group.rows is None:
            out[: plan.num_decodes] = _decode(q[: plan.num_decodes], kv_cache, group, scale)
        else:
            out[group.rows] = _decode(q[group.rows], kv_cache, group, scale)
    for chunk in plan.chunks:
        out[chunk.start : chunk.end] = _prefill(q[chunk.start : chunk.end], kv_cache, chunk, scale)
    return out


def _decode(
    q: torch.Tensor, kv_cache: torch.Tensor, group: DecodeGroup, scale: float
) -> torch.Tensor:
    n, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[2]
    kv = kv_cache.view(-1, head_dim).index_select(0, group.kv_rows)
    k, v = kv.view(2, n, num_kv_heads, -1, head_dim)
    # The query heads of one kv head are the rows of one small product: k and v are read once.
    out = F.scaled_dot_product_attention(
        q.reshape(n, num_kv_heads, -1, head_dim), k, v, attn_mask=group.hidden, scale=scale
    )
    return out.reshape(n, num_heads * head_dim)


def _prefill(
    q: torch.Tensor, kv_cache: torch.Tensor, chunk: PrefillChunk, scale: float
) -> torch.Tensor:
    n, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    kv = kv_cache.view(-1, block_size * head_dim).index_select(0, chunk.kv_pages)
    k, v = kv.view(2, 1, num_kv_heads, -1, head_dim)[..., : chunk.context_len, :]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k,
        v,
        attn_mask=chunk.visible,
        is_causal=chunk.visible is None,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out[0].transpose(0, 1).reshape(n, num_heads * head_dim)


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    kv_cache: torch.Tensor,
) -> AttentionPlan:
    """The plan of one step.

    Args:
        query_lens: tokens of each sequence in this step; those of 1 come first and are decodes.
        context_lens: cached positions of each, this step's included.
        block_tables: KV block IDs of each, at least ⌈context_len / block_size⌉.
        kv_cache: any layer's; its shape, dtype and device alone are used.
    """
    num_decodes = 0
    while num_decodes < len(query_lens) and query_lens[num_decodes] == 1:
        num_decodes += 1
    groups = tuple(
        _plan_group(
            None if len(members) == num_decodes else members,
            [context_lens[row] for row in members],
            [block_tables[row] for row in members],
            kv_cache,
        )
        for members in _group_by_length(context_lens[:num_decodes])
    )
    chunks = []
    start = num_decodes
    for row in range(num_decodes, len(query_lens)):
        end = start + query_lens[row]
        chunks.append(_plan_chunk(start, end, context_lens[row], block_tables[row], kv_cache))
        start = end
    return AttentionPlan(start, num_decodes, groups, tuple(chunks))


def _group_by_length(context_lens: Sequence[int]) -> list[list[int]]:
    """Split so that padding at most doubles what a group reads; short ones stay together."""
    groups: list[list[int]] = []
    floor = 0
    for row in sorted(range(len(context_lens)), key=lambda row: -context_lens[row]):
        if not groups or context_lens[row] < floor:
            groups.append([])
            floor = context_lens[row] // 2 if context_lens[row] > 128 else 0
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def _plan_group(
    members: list[int] | None,
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    kv_cache: torch.Tensor,
) -> DecodeGroup:
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    device, longest = kv_cache.device, max(context_lens)
    width = -(-longest // block_size)
    # What stands for a missing block is never read: the positions there are padding.
    tables = torch.tensor([[*t[:width], *[0] * (width - len(t))] for t in block_tables])
    lens = torch.tensor(context_lens)[:, None]
    position = torch.arange(longest)
    padding = position >= lens
    position = position.where(~padding, 0)
    blocks = tables.gather(1, position // block_size)
    head = torch.arange(num_kv_heads)[:, None]
    k_rows = (blocks[:, None] * num_kv_heads + head) * block_size
    k_rows = (k_rows + (position % block_size)[:, None]).view(-1)
    hidden = None
    if min(context_lens) < longest:
        hidden = torch.zeros(padding.shape, dtype=kv_cache.dtype)
        hidden = hidden.masked_fill_(padding, float("-inf"))[:, None, None].to(device)
    return DecodeGroup(
        rows=None if members is None else torch.tensor(members, device=device),
        kv_rows=torch.cat((k_rows, k_rows + num_blocks * num_kv_heads * block_size)).to(device),
        hidden=hidden,
    )


def _plan_chunk(
    start: int,
    end: int,
    context_len: int,
    block_table: Sequence[int],
    kv_cache: torch.Tensor,
) -> PrefillChunk:
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    device = kv_cache.device
    table = torch.tensor(block_table[: -(-context_len // block_size)])
    pages = table * num_kv_heads + torch.arange(num_kv_heads)[:, None]
    kv_pages = torch.stack((pages, pages + num_blocks * num_kv_heads)).view(-1)
    visible = None
    if end - start < context_len:
        position = torch.arange(context_len - (end - start), context_len)
        visible = (torch.arange(context_len) <= position[:, None]).to(device)
    return PrefillChunk(start, end, kv_pages.to(device), context_len, visible)
