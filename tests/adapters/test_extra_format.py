"""Names of the tensors that are no pairs of a layer's linears, as versions of PEFT write them."""

from __future__ import annotations

import pytest

from openlora.adapters.adapter_config import parse_adapter_config
from openlora.adapters.extra_format import ExtraTensor, check_extras, parse_extra, words
from openlora.errors import AdapterFailed

LAYER = "base_model.model.model.layers.3"


@pytest.mark.parametrize(
    ("tensor", "kind", "module"),
    [
        (f"{LAYER}.mlp.down_proj.lora_magnitude_vector", "magnitude", "layers.3.mlp.down_proj"),
        (f"{LAYER}.mlp.up_proj.lora_magnitude_vector.weight", "magnitude", "layers.3.mlp.up_proj"),
        (f"{LAYER}.self_attn.q_proj.bias", "bias", "layers.3.self_attn.q_proj"),
        (f"{LAYER}.self_attn.q_proj.base_layer.bias", "bias", "layers.3.self_attn.q_proj"),
        (f"{LAYER}.self_attn.q_proj.lora_B.bias", "lora_bias", "layers.3.self_attn.q_proj"),
        (f"{LAYER}.input_layernorm.weight", "weight", "layers.3.input_layernorm"),
        (f"{LAYER}.self_attn.q_norm.weight", "weight", "layers.3.self_attn.q_norm"),
        ("base_model.model.model.norm.weight", "weight", "norm"),
        ("base_model.model.model.norm.modules_to_save.default.weight", "weight", "norm"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "a", "embed_tokens"),
        ("base_model.model.embed_tokens.lora_embedding_B.default", "b", "embed_tokens"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "weight", "embed_tokens"),
    ],
)
def test_names_below_the_model(tensor, kind, module):
    assert parse_extra(tensor) == ExtraTensor(kind, f"model.{module}", tensor)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("base_model.model.lm_head.weight", "weight"),
        ("base_model.model.lm_head.base_layer.weight", "weight"),
        ("base_model.model.lm_head.modules_to_save.weight", "weight"),
        ("base_model.model.lm_head.lora_A.weight", "a"),
        ("base_model.model.lm_head.lora_B.default.weight", "b"),
    ],
)
def test_names_of_the_head(tensor, kind):
    assert parse_extra(tensor) == ExtraTensor(kind, "lm_head", tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        "lm_head.weight",
        "base_model.model.score.weight",
        f"{LAYER}.self_attn.q_proj.weight",
        f"{LAYER}.self_attn.q_proj.base_layer.weight",
        "base_model.model.lm_head.bias",
        "base_model.model.model.embed_tokens.lora_magnitude_vector",
    ],
)
def test_what_is_none_of_them(tensor):
    assert parse_extra(tensor) is None


def config(**fields):
    return parse_adapter_config({"peft_type": "LORA", "target_modules": ["q_proj"]} | fields)


def extra(kind, module):
    return ExtraTensor(kind, module, f"{module}.{kind}")


def test_a_tensor_that_is_there_under_two_names():
    twice = [
        ExtraTensor("weight", "lm_head", "one"),
        ExtraTensor("weight", "lm_head", "two"),
    ]
    with pytest.raises(AdapterFailed, match="one and two are the same"):
        check_extras(config(modules_to_save=["lm_head"]), twice, [])


def test_the_base_layer_of_a_vocabulary_is_always_expected():
    check_extras(config(), [extra("weight", "model.embed_tokens")], [])


def test_norm_means_every_module_whose_name_ends_so():
    saved = [extra("weight", "model.norm"), extra("weight", "model.layers.0.input_layernorm")]
    check_extras(config(modules_to_save=["norm"]), saved, [])
    with pytest.raises(AdapterFailed, match=r"model\.norm.*not expected"):
        check_extras(config(modules_to_save=["input_layernorm"]), saved, [])


def test_dora_of_a_head_is_refused():
    pair = [extra("a", "lm_head"), extra("b", "lm_head")]
    check_extras(config(target_modules=["lm_head"]), pair, [])
    with pytest.raises(AdapterFailed, match="DoRA on lm_head"):
        check_extras(config(target_modules=["lm_head"], use_dora=True), pair, [])


def test_words_name_the_kinds_once():
    found = [extra("bias", "model.layers.0.self_attn.q_proj"), extra("weight", "lm_head")]
    assert words(found * 2) == "a whole lm_head and trained biases"
