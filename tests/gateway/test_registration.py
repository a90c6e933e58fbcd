"""What is told of an adapter before a worker has to refuse it."""

from __future__ import annotations

import pytest

from gateway.registration import check_hidden_size
from openlora.adapters.safetensors_header import TensorEntry
from openlora.errors import AdapterFailed


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (8, 96)),
        ("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", (8, 96)),
        ("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight", (96, 8)),
    ],
)
def test_an_adapter_of_another_hidden_size_is_refused_where_a_size_is_known(
    name: str, shape: tuple[int, int]
) -> None:
    tensors = {name: TensorEntry("F32", shape, "x", 0, 3072)}
    check_hidden_size(tensors, {96})
    check_hidden_size(tensors, set())
    with pytest.raises(AdapterFailed, match="hidden size 96"):
        check_hidden_size(tensors, {64})
