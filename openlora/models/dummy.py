"""Random weights in the shapes that benchmarks use."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from openlora.models.config import ModelConfig
from openlora.models.rotary import RopeScaling
from openlora.models.weights import GetWeight


def _llama3(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    head_dim: int,
    factor: float,
    tie_word_embeddings: bool,
) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor, 1.0, 4.0, 8192),
        max_model_len=131072,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_ids=(128001, 128008, 128009),
        dtype="bfloat16",
    )


DUMMY_CONFIGS = {
    "8b": _llama3(
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        head_dim=128,
        factor=8.0,
        tie_word_embeddings=False,
    ),
    "1b": _llama3(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        factor=32.0,
        tie_word_embeddings=True,
    ),
}
"""Llama-3.1-8B and Llama-3.2-1B."""


def dummy_weights(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> GetWeight:
    """A source of weights: norms are 1, the rest normal with standard deviation 0.02."""
    generator = torch.Generator(device).manual_seed(seed)

    def get(name: str) -> torch.Tensor:
        weight = torch.empty(shapes[name], dtype=dtype, device=device)
        if weight.dim() == 1:
            return weight.fill_(1.0)
        return weight.normal_(0.0, 0.02, generator=generator)

    return get
