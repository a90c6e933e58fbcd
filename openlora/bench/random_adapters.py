"""Random PEFT adapters on all seven linears of a model: what the decode benchmarks serve."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from openlora.models.config import ModelConfig

# Small enough that logits stay finite, large enough that no kernel can skip the work.
_SCALE = 0.02


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module path within a layer → (inputs, outputs) of the seven linears."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def adapter_bytes(config: ModelConfig, rank: int, element_bytes: int) -> int:
    """Bytes of one such adapter's matrices in memory."""
    per_layer = sum(rank * (inputs + outputs) for inputs, outputs in linear_shapes(config).values())
    return config.num_layers * per_layer * element_bytes


def write_adapter(
    directory: Path, config: ModelConfig, *, rank: int, seed: int, dtype: torch.dtype
) -> Path:
    """Write a random adapter of ``rank`` (α = rank) in PEFT's format; returns ``directory``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = linear_shapes(config)
    for layer in range(config.num_layers):
        for module, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            for name, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
                matrix = torch.randn(shape, generator=generator, dtype=torch.float32) * _SCALE
                tensors[f"{prefix}.{name}.weight"] = matrix.to(dtype)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(module.rsplit(".", 1)[-1] for module in shapes),
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory
