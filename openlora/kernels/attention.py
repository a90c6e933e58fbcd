"""Attention over the paged KV cache: one query per sequence in decode, a chunk in prefill.

The cache of a layer is [2, num_blocks, num_kv_heads, block_size, head_dim]. A step's tokens lie in
one [tokens, …] tensor, decode sequences (one token each) first, prefill chunks behind them. The
plan is built once per step and serves every layer (of the same window).

With a window of W, a query sees the W positions that end with its own; the cache holds all.
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
            K's before V's. Padding repeats the first position that a sequence sees: stale values
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
            [-1, block_size · head_dim]; of the blocks that any of the chunk's queries sees.
        context_len: cached positions of these blocks, the chunk's own included.
        visible: [end - start, context_len] bool, lower right triangle, or a band of the window's
            width; None: plain causal from position 0 on.
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
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Softmax(q Kᵀ · scale) V of every token over its own sequence's cached positions, causal.

    Args:
        q: [tokens, num_heads, head_dim], rotated; may be a strided view.
        kv_cache: one layer; the step's own k and v are written already.
        plan: from ``plan_attention``.
        scale: usually 1/√head_dim.
        soft_cap: scores s become soft_cap · tanh(s / soft_cap) before the softmax; 0: they do not.

    Returns:
        A new [tokens, num_heads · head_dim] of q's dtype. Grouped queries: num_heads is a multiple
        of num_kv_heads, query head h reads kv head h // (num_heads / num_kv_heads).
    """
    num_heads, head_dim = q.shape[1], q.shape[2]
    if len(plan.groups) == 1 and not plan.chunks:
        return _decode(q, kv_cache, plan.groups[0], scale, soft_cap)
    out = q.new_empty(plan.num_tokens, num_heads * head_dim)
    for group in plan.groups:
        if group.rows is None:
            decodes = q[: plan.num_decodes]
            out[: plan.num_decodes] = _decode(decodes, kv_cache, group, scale, soft_cap)
        else:
            out[group.rows] = _decode(q[group.rows], kv_cache, group, scale, soft_cap)
    for chunk in plan.chunks:
        rows = slice(chunk.start, chunk.end)
        out[rows] = _prefill(q[rows], kv_cache, chunk, scale, soft_cap)
    return out


def _decode(
    q: torch.Tensor, kv_cache: torch.Tensor, group: DecodeGroup, scale: float, soft_cap: float
) -> torch.Tensor:
    n, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[2]
    kv = kv_cache.view(-1, head_dim).index_select(0, group.kv_rows)
    k, v = kv.view(2, n, num_kv_heads, -1, head_dim)
    # The query heads of one kv head are the rows of one small product: k and v are read once.
    q = q.reshape(n, num_kv_heads, -1, head_dim)
    if soft_cap:
        out = _capped(q, k, v, group.hidden, scale, soft_cap)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.hidden, scale=scale)
    return out.reshape(n, num_heads * head_dim)


def _prefill(
    q: torch.Tensor, kv_cache: torch.Tensor, chunk: PrefillChunk, scale: float, soft_cap: float
) -> torch.Tensor:
    n, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    kv = kv_cache.view(-1, block_size * head_dim).index_select(0, chunk.kv_pages)
    k, v = kv.view(2, 1, num_kv_heads, -1, head_dim)[..., : chunk.context_len, :]
    if soft_cap:
        hidden = _hidden(chunk.visible, n, q)
        # [kv heads, n · queries of one, head_dim]: the mask is repeated along with the queries.
        grouped = q.view(n, num_kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
        hidden = hidden.repeat_interleave(num_heads // num_kv_heads, 0)
        out = _capped(grouped, k[0], v[0], hidden, scale, soft_cap)
        out = out.view(num_kv_heads, n, -1, head_dim).transpose(0, 1)
        return out.reshape(n, num_heads * head_dim)
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


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """Attention with soft-capped scores, which torch's own has not; scores in fp32."""
    scores = (q @ k.transpose(-1, -2)).float().mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    if hidden is not None:
        scores += hidden
    return scores.softmax(-1).to(q.dtype) @ v


def _hidden(visible: torch.Tensor | None, n: int, q: torch.Tensor) -> torch.Tensor:
    """[n, context_len] of fp32: -inf at what is not visible, else 0."""
    if visible is None:
        visible = torch.ones(n, n, dtype=torch.bool, device=q.device).tril_()
    return torch.zeros(visible.shape, device=q.device).masked_fill_(~visible, float("-inf"))


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    kv_cache: torch.Tensor,
    window: int = 0,
) -> AttentionPlan:
    """The plan of one step.

    Args:
        query_lens: tokens of each sequence in this step; those of 1 come first and are decodes.
        context_lens: cached positions of each, this step's included.
        block_tables: KV block IDs of each, at least ⌈context_len / block_size⌉.
        kv_cache: any layer's; its shape, dtype and device alone are used.
        window: positions that a query sees, its own included; 0: all before it.
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
            window,
        )
        for members in _group_by_length(_within(window, context_lens[:num_decodes]))
    )
    chunks = []
    start = num_decodes
    for row in range(num_decodes, len(query_lens)):
        end = start + query_lens[row]
        context = context_lens[row]
        chunks.append(_plan_chunk(start, end, context, block_tables[row], kv_cache, window))
        start = end
    return AttentionPlan(start, num_decodes, groups, tuple(chunks))


def _within(window: int, context_lens: Sequence[int]) -> list[int]:
    """How many positions a decode sees of each context."""
    return [min(length, window) if window else length for length in context_lens]


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
    window: int,
) -> DecodeGroup:
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    seen = _within(window, context_lens)
    device, longest = kv_cache.device, max(seen)
    width = -(-max(context_lens) // block_size)
    # What stands for a missing block is never read: the positions there are padding.
    tables = torch.tensor([[*t[:width], *[0] * (width - len(t))] for t in block_tables])
    lens = torch.tensor(seen)[:, None]
    offset = torch.arange(longest)
    padding = offset >= lens
    position = torch.tensor(context_lens)[:, None] - lens + offset.where(~padding, 0)
    blocks = tables.gather(1, position // block_size)
    head = torch.arange(num_kv_heads)[:, None]
    k_rows = (blocks[:, None] * num_kv_heads + head) * block_size
    k_rows = (k_rows + (position % block_size)[:, None]).view(-1)
    hidden = None
    if min(seen) < longest:
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
    window: int,
) -> PrefillChunk:
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    device, n = kv_cache.device, end - start
    first = max(context_len - n - window + 1, 0) // block_size if window else 0
    table = torch.tensor(block_table[first : -(-context_len // block_size)])
    context_len -= first * block_size
    pages = table * num_kv_heads + torch.arange(num_kv_heads)[:, None]
    kv_pages = torch.stack((pages, pages + num_blocks * num_kv_heads)).view(-1)
    visible = None
    is_narrow = 0 < window < context_len
    if n < context_len or is_narrow:
        query = torch.arange(context_len - n, context_len)[:, None]
        key = torch.arange(context_len)
        visible = key <= query
        if is_narrow:
            visible &= key > query - window
        visible = visible.to(device)
    return PrefillChunk(start, end, kv_pages.to(device), context_len, visible)
