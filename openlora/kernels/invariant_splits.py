"""How the batch-invariant attention cuts contexts, and what its launches share. No kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

_TILE_ROWS = 64
"""Query rows of a tile: tokens times the query heads of a KV head."""


@dataclass(frozen=True, slots=True)
class AttentionSplits:
    """Where contexts are cut: the same for all, so that a position's split is always the same.

    Attributes:
        small, num_small: so many splits of so many positions come first,
        large: and others of so many behind them; both are multiples of all tiles.
    """

    small: int = 256
    num_small: int = 32
    large: int = 4096

    def count(self, context_len: int) -> int:
        """Splits of a context."""
        behind = context_len - self.num_small * self.small
        if behind <= 0:
            return triton.cdiv(context_len, self.small)
        return self.num_small + triton.cdiv(behind, self.large)


class UnitRows:
    """Rows of one token each: their tables, and what the splits of a launch leave for the last.

    Args:
        rows: most rows of a launch.
        num_heads, num_kv_heads, head_dim: of the model.
        max_model_len: longest context.
        parts: programs that a row's splits are dealt to.
        device: of the cache.
        splits: where contexts are cut.

    Attributes:
        spans, tiles: as ``invariant_attention`` takes them: row i is token i.
    """

    def __init__(
        self,
        rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_model_len: int,
        parts: int,
        device: torch.device,
        splits: AttentionSplits = AttentionSplits(),
    ) -> None:
        self.splits = splits
        self.max_splits = splits.count(max_model_len)
        self.parts = min(parts, self.max_splits)
        at = torch.arange(rows, dtype=torch.int32, device=device)
        self.spans = torch.stack((at, torch.ones_like(at), torch.zeros_like(at)), 1)
        self.tiles = torch.stack((at, torch.zeros_like(at)), 1)
        # With one part there is nothing to leave.
        split_rows = rows if self.parts > 1 else 1
        shape = (split_rows, num_kv_heads, self.max_splits, padded_group(num_heads, num_kv_heads))
        self.partial = torch.empty((*shape, head_dim), device=device)
        self.top = torch.empty(shape, device=device)
        self.total = torch.empty(shape, device=device)
        # Counts back to zero at the end of every launch.
        self.arrived = torch.zeros((split_rows, num_kv_heads), dtype=torch.int32, device=device)


def invariant_tile_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Tokens of one query tile of ``invariant_attention``."""
    return max(_TILE_ROWS // padded_group(num_heads, num_kv_heads), 1)


def padded_group(num_heads: int, num_kv_heads: int) -> int:
    """Query heads of a KV head, rounded up to a power of two."""
    group: int = triton.next_power_of_2(num_heads // num_kv_heads)
    return group
