"""Weights from a GGUF file, dequantized by transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from openlora.errors import SetupError, UnknownModel
from openlora.models.config import SUPPORTED_ARCHITECTURES, ModelConfig


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors (fp32) of a GGUF file; slow, tens of seconds for a small model.

    Raises:
        UnknownModel: an architecture that is not supported.
        SetupError: the file cannot be read, or the package ``gguf`` is not installed.
    """
    # Heavy, and needed for this one format alone.
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        raw = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise SetupError(f"reading {path} needs the package gguf: pip install gguf") from error
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"{path} cannot be read as GGUF: {error}") from error
    if raw.model_type != "llama":
        raise UnknownModel(
            f"model {path} has architecture {raw.model_type}; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    fields = raw.to_dict()
    fields["architectures"] = ["LlamaForCausalLM"]
    fields.pop("quantization_config", None)
    config = ModelConfig.from_hf(fields, str(path))
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return config, dict(model.state_dict())
