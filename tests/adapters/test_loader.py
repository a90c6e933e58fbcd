"""From files to pages: the update that the pages encode is PEFT's, and nothing else is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from openlora.adapters.loader import load_adapter
from openlora.adapters.lora_set import PAGE_RANK
from openlora.adapters.page_tensors import PageTensors, page_bytes
from openlora.adapters.pages import PagePool
from openlora.adapters.site_shapes import site_shapes
from openlora.adapters.store import AdapterStore
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import (
    FEATURES,
    PREFIX,
    SHAPE,
    edit_config,
    edit_tensors,
    write_adapter,
)

ALL = tuple(path.rpartition(".")[2] for path in FEATURES)


def deltas(pages, ids):
    """ΔW of every module of every layer, [out, in], summed over an adapter's pages."""
    found = {}
    for site, pages_here in zip(pages.sites, ids, strict=True):
        shape = site.shape
        for layer in range(SHAPE.num_layers):
            total = torch.zeros(len(shape.block_slices) * shape.block_out, shape.in_features)
            for page in pages_here:
                for block, source in enumerate(shape.block_slices):
                    a = site.a[page, layer, :, source * PAGE_RANK : (source + 1) * PAGE_RANK]
                    rows = slice(block * shape.block_out, (block + 1) * shape.block_out)
                    total[rows] += (a @ site.b[page, layer, block]).T
            for module in shape.modules:
                start = module.first_block * shape.block_out
                found[layer, module.path] = total[start : start + module.out_features]
    return found


def load_into_pages(directory, num_pages=16):
    adapter = load_adapter(directory, SHAPE, torch.float32)
    pool = PagePool((num_pages,) * 4)
    # Pages that held another adapter before.
    pages = PageTensors(SHAPE, pool.num_pages, torch.float32, "cpu")
    for site in pages.sites:
        site.a.fill_(99.0)
        site.b.fill_(99.0)
    ids = pool.allocate("x", adapter.page_counts)
    pages.write(ids, adapter)
    return adapter, pages, ids


@pytest.mark.parametrize("rank", [1, 4, 15, 16, 17, 33, 64, 128])
@pytest.mark.parametrize("modules", [ALL, ("q_proj", "v_proj"), ("down_proj",)])
def test_pages_hold_the_update(tmp_path, rank, modules):
    directory = write_adapter(tmp_path / "a", modules=modules, rank=rank, lora_alpha=3)
    adapter, pages, ids = load_into_pages(directory)
    count = -(-rank // PAGE_RANK)
    touched = {
        site.name: any(m.path.rpartition(".")[2] in modules for m in site.modules)
        for site in site_shapes(SHAPE)
    }
    assert adapter.page_counts == tuple(count if t else 0 for t in touched.values())
    tensors = load_file(directory / "adapter_model.safetensors")
    for (layer, path), delta in deltas(pages, ids).items():
        name = f"{PREFIX}.{layer}.{path}"
        if path.rpartition(".")[2] not in modules:
            assert (delta == 0).all()
            continue
        want = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] * (3 / rank)
        torch.testing.assert_close(delta, want, atol=1e-4, rtol=1e-4)


def test_mixed_ranks_take_the_largest_of_each_site(tmp_path):
    directory = write_adapter(tmp_path / "a", modules=ALL, rank=20)
    edit_config(directory, rank_pattern={"k_proj": 4, "mlp.down_proj": 16})

    def cut(tensors):
        for name in list(tensors):
            rank = 4 if "k_proj" in name else 16 if "down_proj" in name else 20
            kept = tensors[name][:rank] if "lora_A" in name else tensors[name][:, :rank]
            tensors[name] = kept.clone()

    edit_tensors(directory, cut)
    adapter, pages, ids = load_into_pages(directory)
    assert adapter.page_counts == (2, 2, 2, 1)
    tensors = load_file(directory / "adapter_model.safetensors")
    name = f"{PREFIX}.1.self_attn.k_proj"
    want = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] * (40 / 4)
    torch.testing.assert_close(deltas(pages, ids)[1, "self_attn.k_proj"], want)


def test_some_layers_only(tmp_path):
    directory = write_adapter(tmp_path / "a", layers=[1], layers_to_transform=[1])
    _, pages, ids = load_into_pages(directory)
    found = deltas(pages, ids)
    assert (found[0, "self_attn.q_proj"] == 0).all()
    assert (found[1, "self_attn.q_proj"] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_target_dtype(tmp_path, dtype):
    adapter = load_adapter(write_adapter(tmp_path / "a"), SHAPE, dtype)
    assert {weights.a.dtype for weights in adapter.sites} == {dtype}
    assert adapter.info.rank == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value):
    directory = write_adapter(tmp_path / "a")
    name = f"{PREFIX}.1.self_attn.v_proj.lora_B.weight"
    edit_tensors(directory, lambda tensors: tensors[name].view(-1)[5].fill_(value))
    with pytest.raises(AdapterFailed, match=r"v_proj\.lora_B\.weight holds values that are not"):
        load_adapter(directory, SHAPE, torch.float32)


def test_a_store_that_returns_other_bytes(tmp_path):
    store = AdapterStore(tmp_path / "store")
    source = write_adapter(tmp_path / "a")
    path = store.path(store.put(source).hash)
    load_adapter(path, SHAPE, torch.float32)
    weights = path / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterFailed, match=r"the store's copy of .* is damaged .*; add the"):
        load_adapter(path, SHAPE, torch.float32)
    store.put(source)
    load_adapter(path, SHAPE, torch.float32)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_is_rounded_once(tmp_path, dtype, target):
    directory = write_adapter(tmp_path / "a", dtype=dtype, lora_alpha=3)
    name = f"{PREFIX}.0.self_attn.v_proj.lora_B.weight"
    want = (load_file(directory / "adapter_model.safetensors")[name].float() * 0.75).to(target)
    site = load_adapter(directory, SHAPE, target).sites[0]
    block = site_shapes(SHAPE)[0].modules[2].first_block
    assert torch.equal(site.b[0, 0, block, :4].T, want)


def test_values_that_do_not_fit_the_target_dtype(tmp_path):
    directory = write_adapter(tmp_path / "a", lora_alpha=1e6)
    load_adapter(directory, SHAPE, torch.float32)
    with pytest.raises(AdapterFailed, match=r"does not fit torch\.float16"):
        load_adapter(directory, SHAPE, torch.float16)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (replace(SHAPE, hidden_size=32), "maps 24 to 32 features; in this base model it maps 32"),
        (replace(SHAPE, num_layers=1), "has 1 layers; the adapter was made for tiny/base"),
        (replace(SHAPE, num_kv_heads=4), "v_proj maps 24 to 16 features"),
        (replace(SHAPE, num_layers=3), "layers.2.self_attn.q_proj: lora_A and lora_B are missing"),
    ],
)
def test_another_base_model(tmp_path, other, says):
    with pytest.raises(AdapterFailed, match=says):
        load_adapter(write_adapter(tmp_path / "a"), other, torch.float32)


def test_a_targeted_module_that_is_missing(tmp_path):
    directory = write_adapter(tmp_path / "a")
    name = f"{PREFIX}.0.self_attn.v_proj"

    def drop(tensors):
        del tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]

    edit_tensors(directory, drop)
    with pytest.raises(AdapterFailed, match=r"layers\.0\.self_attn\.v_proj: lora_A and lora_B are"):
        load_adapter(directory, SHAPE, torch.float32)


def test_a_linear_that_the_model_does_not_have(tmp_path):
    directory = write_adapter(tmp_path / "a")
    edit_config(directory, target_modules=["q_proj", "v_proj", "w_pack"])
    name = f"{PREFIX}.0.self_attn.w_pack"
    edit_tensors(
        directory,
        lambda tensors: tensors.update(
            {
                f"{name}.lora_A.weight": torch.zeros(4, 24),
                f"{name}.lora_B.weight": torch.zeros(24, 4),
            }
        ),
    )
    with pytest.raises(AdapterFailed, match="w_pack is no linear of this base model"):
        load_adapter(directory, SHAPE, torch.float32)


def test_page_bytes():
    per_set = sum(page_bytes(SHAPE, torch.float32))
    pages = PageTensors(SHAPE, (1, 1, 1, 1), torch.float32, "cpu")
    assert per_set == sum(site.a.nbytes + site.b.nbytes for site in pages.sites)
