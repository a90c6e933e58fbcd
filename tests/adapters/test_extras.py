"""Extras against the base model: what is kept, what is dropped, and what does not fit it."""

from __future__ import annotations

import pytest
import torch

from openlora.adapters.loader import load_adapter
from openlora.adapters.peft_format import inspect_adapter, read_layout
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import SHAPE, edit_config, edit_tensors, write_adapter

VOCAB, HIDDEN = SHAPE.vocab_size, SHAPE.hidden_size
HEAD = "base_model.model.lm_head"
EMBEDDING = "base_model.model.model.embed_tokens"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def base(name):
    generator = torch.Generator().manual_seed(len(name))
    if name.endswith("bias"):
        return torch.zeros(4 * 8)
    if "norm" in name:
        return torch.ones(HIDDEN)
    rows = VOCAB if name.startswith(("lm_head", "model.embed")) else 4 * 8
    return torch.randn(rows, HIDDEN, generator=generator)


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "a")


def add(directory, **tensors):
    edit_tensors(directory, lambda all_tensors: all_tensors.update(tensors))


def load(directory, base=base):
    return load_adapter(directory, SHAPE, torch.float32, base=base)


def test_a_plain_adapter_has_none_and_needs_no_base(adapter):
    assert load(adapter, base=None).extras is None


def test_a_base_layer_saved_along_is_dropped_where_it_is_the_base_models(adapter):
    add(adapter, **{f"{HEAD}.base_layer.weight": base("lm_head.weight")})
    assert load(adapter).extras is None
    add(adapter, **{f"{HEAD}.base_layer.weight": base("lm_head.weight") + 1})
    extras = load(adapter).extras
    assert extras.head.weight.shape == (VOCAB, HIDDEN)
    assert extras.size_bytes == VOCAB * HIDDEN * 4


def test_added_tokens_are_rows_behind_the_base_models(adapter):
    rows = torch.cat([base("model.embed_tokens.weight"), torch.ones(2, HIDDEN)])
    add(adapter, **{f"{EMBEDDING}.weight": rows, f"{HEAD}.weight": torch.ones(VOCAB + 2, HIDDEN)})
    extras = load(adapter).extras
    assert extras.embedding.weight is None
    assert torch.equal(extras.embedding.added, torch.ones(2, HIDDEN))
    assert extras.head.weight.shape == (VOCAB, HIDDEN)
    assert extras.num_added == 2
    assert "added vocabulary" in extras.inexact


def test_what_peft_saves_under_three_names_is_one(adapter):
    rows = torch.cat([base("model.embed_tokens.weight"), torch.ones(2, HIDDEN)])
    edit_config(adapter, modules_to_save=["embed_tokens"])
    names = ("weight", "modules_to_save.weight", "original_module.weight")
    add(adapter, **{f"{EMBEDDING}.{name}": rows + (name[0] == "o") for name in names})
    assert torch.equal(load(adapter).extras.embedding.added, torch.ones(2, HIDDEN))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{HEAD}.weight": (VOCAB - 1, HIDDEN)}, r"\[29, 24\]; this base model needs 30 tokens"),
        ({f"{HEAD}.weight": (VOCAB + 2, HIDDEN)}, "lm_head has 2 added tokens and embed_tokens 0"),
        ({f"{EMBEDDING}.weight": (VOCAB, HIDDEN + 1)}, r"has shape \[30, 25\]"),
        ({f"{EMBEDDING}.weight": (VOCAB + (1 << 16) + 1, HIDDEN)}, "may add up to 65536"),
    ],
)
def test_tables_that_do_not_fit_are_refused_with_their_shapes(adapter, tensors, says):
    add(adapter, **{name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(AdapterFailed, match=says):
        load(adapter)


def test_a_tokenizer_belongs_to_an_adapter_with_tables_alone(adapter):
    plain = inspect_adapter(adapter)
    (adapter / "tokenizer.json").write_text("{}")
    assert inspect_adapter(adapter) == plain
    add(adapter, **{f"{EMBEDDING}.weight": torch.ones(VOCAB + 2, HIDDEN)})
    with_tokenizer = inspect_adapter(adapter).hash
    assert "tokenizer.json" in [name for name, _ in read_layout(adapter).files]
    (adapter / "tokenizer.json").write_text("{ }")
    assert inspect_adapter(adapter).hash != with_tokenizer


def test_values_that_are_not_finite_are_named(adapter):
    edit_config(adapter, bias="lora_only")
    add(adapter, **{f"{Q}.bias": torch.full((32,), torch.inf)})
    with pytest.raises(AdapterFailed, match=r"q_proj\.bias holds values that are not finite"):
        load(adapter)


def test_without_the_base_models_weights_it_is_refused_by_kind(adapter):
    edit_config(adapter, bias="lora_only")
    add(adapter, **{f"{Q}.bias": torch.ones(32)})
    with pytest.raises(AdapterFailed, match="trained biases, which needs a base model in safe"):
        load(adapter, base=None)


def test_a_bias_is_kept_as_its_difference_over_the_fused_output(adapter):
    edit_config(adapter, bias="lora_only")
    add(adapter, **{f"{Q}.bias": torch.full((32,), 0.5)})
    extras = load(adapter).extras
    ((layer, site), linear) = next(iter(extras.linears.items()))
    assert (layer, site) == (0, 0)
    assert linear.gain is None
    assert linear.bias.tolist() == [0.5] * 32 + [0.0] * 32
