"""PEFT adapters written by hand, so that every fault can be put in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from openlora.adapters.site_shapes import site_shapes


@dataclass(frozen=True)
class Shape:
    """A tiny base model."""

    hidden_size: int = 24
    intermediate_size: int = 40
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    fused_projections: bool = False
    vocab_size: int = 30
    tie_word_embeddings: bool = False
    norm_offset: float = 0.0


SHAPE = Shape()
FEATURES = {
    module.path: (site.in_features, module.out_features)
    for site in site_shapes(SHAPE)
    for module in site.modules
}
PREFIX = "base_model.model.model.layers"


def write_adapter(
    directory: Path,
    modules=("q_proj", "v_proj"),
    rank=4,
    dtype=torch.float32,
    layers=range(SHAPE.num_layers),
    **config,
) -> Path:
    """A valid adapter; ``config`` overrides fields of adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "bias": "none",
        "base_model_name_or_path": "tiny/base",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.05,
    }
    (directory / "adapter_config.json").write_text(json.dumps(fields | config))
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for layer in layers:
        for path, (in_features, out_features) in FEATURES.items():
            if path.rpartition(".")[2] in modules:
                name = f"{PREFIX}.{layer}.{path}"
                a = torch.randn(rank, in_features, generator=generator)
                b = torch.randn(out_features, rank, generator=generator)
                tensors[f"{name}.lora_A.weight"] = a.to(dtype)
                tensors[f"{name}.lora_B.weight"] = b.to(dtype)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def edit_config(directory: Path, **fields) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
