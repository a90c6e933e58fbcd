"""Small PEFT directories, written byte by byte: no torch in the gateway's tests."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_adapter(
    directory: Path, *, hidden: int = 64, rank: int = 4, without: str = "", fill: int = 0
) -> Path:
    """A rank-``rank`` adapter on q_proj of one layer; ``without`` leaves a tensor out."""
    directory.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {
        f"{prefix}.lora_A.weight": (rank, hidden),
        f"{prefix}.lora_B.weight": (hidden, rank),
    }
    header = {}
    offset = 0
    for name, shape in shapes.items():
        if without and without in name:
            continue
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(encoded)) + encoded + bytes([fill]) * offset
    )
    return directory
