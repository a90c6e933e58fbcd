"""The KV cache's tensors. Which block belongs to whom is kv_blocks.py's business."""

from __future__ import annotations

import torch

from openlora.models.config import ModelConfig


class KVCache:
    """Keys and values of all layers, in blocks.

    Attributes:
        tensor: [layers, 2, num_blocks, num_kv_heads, block_size, head_dim], K then V.
        layers: per layer its view.
        block_size: tokens of a block.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str,
        block_size: int = 16,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.tensor = torch.zeros(
            (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim),
            dtype=dtype,
            device=device,
        )
        self.layers = tuple(self.tensor)


def block_bytes(config: ModelConfig, dtype: torch.dtype, block_size: int = 16) -> int:
    """Bytes of one block in all layers."""
    per_token = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    return config.num_layers * block_size * per_token
