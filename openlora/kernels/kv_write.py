"""Rotary embedding of q and k, and the write of k and v into the paged cache.

One layer's cache is [2, num_blocks, num_kv_heads, block_size, head_dim]: K then V, each block's
tokens of one head contiguous, so that a block of a head is one row of a gather.
"""

from __future__ import annotations

import torch


def rope_and_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_rows: torch.Tensor,
) -> None:
    """Rotate q and k of every token in place; copy its rotated k and its v into the cache.

    Rotation pairs dimension i with i + head_dim/2 (the layout of Hugging Face checkpoints):
    out = x · cos + roll(x, head_dim/2) · sin. Where cos is narrower than a head, so much of each
    head, its first dimensions, is rotated as if that were all of it.

    Args:
        qkv: [tokens, num_heads + 2 · num_kv_heads, head_dim]: q, k, v heads; in place.
        cos: [tokens, 1, rotary_dim], qkv's dtype; rotary_dim is even, at most head_dim.
        sin: as cos, its first half negated.
        kv_cache: one layer, [2, num_blocks, num_kv_heads, block_size, head_dim]; in place.
        slot_rows: [tokens · 2 · num_kv_heads] int64 from ``slot_rows_for``.

    No tokens: nothing is written.
    """
    num_kv_heads, head_dim = kv_cache.shape[2], kv_cache.shape[4]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    rotary_dim = cos.shape[-1]
    qk = qkv[:, : num_heads + num_kv_heads, :rotary_dim]
    rolled = qk.roll(rotary_dim // 2, -1)
    qk.mul_(cos).addcmul_(rolled, sin)
    kv_cache.view(-1, head_dim).index_copy_(0, slot_rows, qkv[:, num_heads:].reshape(-1, head_dim))


def slot_rows_for(
    blocks: torch.Tensor, offsets: torch.Tensor, kv_shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """Rows of the flattened cache [-1, head_dim] that a step's tokens are written to.

    Args:
        blocks: [tokens] int64, each token's KV block ID.
        offsets: [tokens] int64, its place within the block.
        kv_shape: shape of one layer's cache.

    Returns:
        [tokens · 2 · num_kv_heads] int64: per token its k rows, then its v rows.
    """
    _, num_blocks, num_kv_heads, block_size, _ = kv_shape
    head = torch.arange(num_kv_heads, device=blocks.device)
    k_rows = (blocks[:, None] * num_kv_heads + head) * block_size + offsets[:, None]
    return torch.cat((k_rows, k_rows + num_blocks * num_kv_heads * block_size), dim=1).view(-1)
