"""Settings are refused with their name, their value and what is allowed."""

from __future__ import annotations

import dataclasses

import pytest

from openlora.engine import EngineConfig
from openlora.errors import SetupError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": ""}, "model is empty"),
        ({"device": "tpu"}, "device is 'tpu'; choose one of auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"load_format": "pickle"}, "load_format is 'pickle'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"num_kv_blocks": 0}, "num_kv_blocks is 0"),
        ({"kv_cache_bytes": -5}, "kv_cache_bytes is -5"),
        ({"adapter_cache_bytes": -1}, "adapter_cache_bytes is -1"),
        ({"adapter_pages": (1, 1, 1)}, "four counts"),
        ({"adapter_pages": (1, 1, -1, 1)}, "adapter_pages is -1"),
        ({"memory_fraction": 1.5}, "memory_fraction is 1.5"),
        (
            {"deterministic": True, "attention_backend": "flash-attn-4"},
            "deterministic is set, and attention_backend is 'flash-attn-4'",
        ),
        ({"max_graph_tokens": -1}, "max_graph_tokens is -1; it must be at least 0"),
        ({"max_num_seqs": 65, "max_num_batched_tokens": 64}, "less than max_num_seqs"),
    ],
)
def test_bad_values(settings, words):
    with pytest.raises(SetupError, match=words):
        EngineConfig(**{"model": "m"} | settings)


def test_it_is_frozen():
    config = EngineConfig("m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = "other"
