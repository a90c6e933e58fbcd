"""Random PEFT adapters on all seven linears of a model: what the decode benchmarks serve."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from openlora.models.config import ModelConfig

# Small enough that logits stay finite, large enough that no kernel can skip the work.
_SCALE = 0.02

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


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
    directory: Path,
    config: ModelConfig,
    *,
    rank: int,
    seed: int,
    dtype: torch.dtype,
    targets: Sequence[str] = ALL_TARGETS,
) -> Path:
    """Write a random adapter of ``rank`` (α = rank) in PEFT's format; returns ``directory``.

    Thread-safe, and without torch's own threads: many are written at a time.
    """
    generator = np.random.default_rng(seed)
    tensors = {
        name: noise(generator, shape, dtype)
        for name, shape in adapter_tensors(config, rank, targets)
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = json.dumps(peft_settings(rank, targets))
    (directory / "adapter_config.json").write_text(settings, encoding="utf-8")
    return directory


def adapter_tensors(
    config: ModelConfig, rank: int, targets: Sequence[str] = ALL_TARGETS
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and shape of each tensor of an adapter's file."""
    for layer in range(config.num_layers):
        for module, (inputs, outputs) in linear_shapes(config).items():
            if module.rsplit(".", 1)[-1] in targets:
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                yield f"{prefix}.lora_A.weight", (rank, inputs)
                yield f"{prefix}.lora_B.weight", (outputs, rank)


def peft_settings(rank: int, targets: Sequence[str] = ALL_TARGETS) -> dict[str, object]:
    """The adapter_config.json of an adapter with α = ``rank``."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
    }


def noise(
    generator: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Small normal values."""
    values = generator.standard_normal(shape, np.float32) * np.float32(_SCALE)
    if dtype == torch.bfloat16:
        # The upper halves of the fp32 bits: noise need not be rounded.
        return torch.from_numpy((values.view(np.uint32) >> 16).astype(np.int16)).view(dtype)
    return torch.from_numpy(values.astype(np.float16) if dtype == torch.float16 else values)
