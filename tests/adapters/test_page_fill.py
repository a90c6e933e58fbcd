"""Pages filled by the native routine are, bit for bit, those that torch fills."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openlora.adapters.loader import load_adapter
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import FEATURES, PREFIX, SHAPE, edit_tensors, write_adapter
from tests.kernels.native import kernels_or_skip

ALL = tuple(path.rpartition(".")[2] for path in FEATURES)
TYPES = (torch.float32, torch.bfloat16)


def assert_same_pages(directory, target):
    expected = load_adapter(directory, SHAPE, target)
    loaded = load_adapter(directory, SHAPE, target, native=kernels_or_skip())
    assert loaded.info == expected.info
    for got, want in zip(loaded.sites, expected.sites, strict=True):
        assert torch.equal(got.a.view(torch.uint8), want.a.view(torch.uint8))
        assert torch.equal(got.b.view(torch.uint8), want.b.view(torch.uint8))


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [1, 4, 15, 16, 17, 33, 64])
def test_ranks_and_types(tmp_path, rank, dtype, target):
    directory = write_adapter(tmp_path / "a", modules=ALL, rank=rank, lora_alpha=3, dtype=dtype)
    assert_same_pages(directory, target)


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("down_proj",), ("k_proj", "up_proj")])
def test_some_modules_of_some_layers(tmp_path, modules):
    directory = write_adapter(
        tmp_path / "a", modules=modules, rank=16, layers=[1], layers_to_transform=[1]
    )
    assert_same_pages(directory, torch.bfloat16)


def test_half_precision_is_left_to_torch(tmp_path):
    directory = write_adapter(tmp_path / "a", rank=16, dtype=torch.float16)
    assert_same_pages(directory, torch.float32)
    assert_same_pages(directory, torch.float16)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=96, max_size=96), st.floats(1e-3, 1e3))
def test_every_number_is_rounded_alike(tmp_path_factory, bits, alpha):
    directory = write_adapter(
        tmp_path_factory.mktemp("a"), modules=("v_proj",), rank=4, lora_alpha=alpha
    )

    def put(tensors):
        values = torch.tensor(bits).to(torch.int32).view(torch.float32)
        # What is not finite, or would overflow, is another test's.
        values = torch.where(values.abs() < 1e30, values, torch.ones(()))
        for tensor in tensors.values():
            flat = tensor.view(-1)
            flat[: len(bits)] = values[: len(flat)]

    edit_tensors(directory, put)
    for target in TYPES:
        assert_same_pages(directory, target)


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("rank", "at"), [(4, 5), (16, 0), (16, -1), (17, -1), (17, 16)])
def test_a_value_that_is_not_finite_is_named(tmp_path, matrix, value, rank, at):
    directory = write_adapter(tmp_path / "a", modules=ALL, rank=rank)
    name = f"{PREFIX}.1.self_attn.v_proj.lora_{matrix}.weight"
    edit_tensors(directory, lambda tensors: tensors[name].view(-1)[at].fill_(value))
    with pytest.raises(AdapterFailed, match=rf"v_proj\.lora_{matrix}\.weight holds values that"):
        load_adapter(directory, SHAPE, torch.bfloat16, native=kernels_or_skip())


def test_a_product_that_overflows_is_named(tmp_path):
    directory = write_adapter(tmp_path / "a", rank=16, lora_alpha=1e6)
    name = f"{PREFIX}.0.self_attn.v_proj.lora_B.weight"
    edit_tensors(directory, lambda tensors: tensors[name].view(-1)[7].fill_(1e35))
    with pytest.raises(AdapterFailed, match=r"lora_B times its scale 62500 does not fit"):
        load_adapter(directory, SHAPE, torch.float32, native=kernels_or_skip())


def test_memory_of_files_is_used_again_but_never_by_what_was_loaded(tmp_path):
    first = write_adapter(tmp_path / "a", rank=4)
    second = write_adapter(tmp_path / "b", rank=8)
    loaded = load_adapter(first, SHAPE, torch.float32)
    kept = [(site.a.clone(), site.b.clone()) for site in loaded.sites]
    load_adapter(second, SHAPE, torch.float32)
    for site, (a, b) in zip(loaded.sites, kept, strict=True):
        assert torch.equal(site.a, a)
        assert torch.equal(site.b, b)
