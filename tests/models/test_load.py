"""Loading: every source and form of weights, and a clear error for each broken one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from openlora.errors import SetupError, UnknownModel
from openlora.models.dummy import DUMMY_CONFIGS, dummy_weights
from openlora.models.load import find_model, load_model
from openlora.models.weights import weight_shapes


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_and_progress(saved, dtype):
    calls = []
    model = load_model(str(saved), dtype=dtype, progress=lambda *args: calls.append(args))
    assert model.dtype == getattr(torch, dtype)
    assert model.config.dtype == dtype
    assert calls == [(1, 2), (2, 2)]


def test_auto_is_float32_on_cpu(saved):
    assert load_model(str(saved)).dtype is torch.float32


def test_sharded_equals_single(saved, tmp_path):
    model = LlamaForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    one, other = load_model(str(saved)), load_model(str(tmp_path / "sharded"))
    assert torch.equal(one._embedding, other._embedding)
    assert torch.equal(one._layers[1].mlp_norm, other._layers[1].mlp_norm)


def test_missing_unexpected_and_misshapen_tensors_are_named(saved):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(saved, lambda tensors: tensors.update({name: torch.zeros(40, 31)}))
    with pytest.raises(SetupError, match=r"up_proj.*\[40, 31\].*\[40, 32\]"):
        load_model(str(saved))
    edit(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(SetupError, match=r"up_proj\.weight is missing"):
        load_model(str(saved))
    edit(
        saved,
        lambda tensors: tensors.update({name: torch.zeros(40, 32), "model.extra": torch.ones(1)}),
    )
    with pytest.raises(SetupError, match=r"model\.extra is not expected"):
        load_model(str(saved))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_a_tensor_of_another_dtype_is_named(saved, dtype):
    name = "model.layers.0.mlp.down_proj.weight"
    edit(saved, lambda tensors: tensors.update({name: torch.zeros(32, 40, dtype=dtype)}))
    with pytest.raises(SetupError, match=r"down_proj\.weight has dtype (I8|F64); supported: F32"):
        load_model(str(saved))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_weights_in_pickle_files_alone_are_refused(saved, name):
    (saved / "model.safetensors").rename(saved / name)
    with pytest.raises(SetupError, match=f"{name}, a pickle file.*safetensors"):
        load_model(str(saved))


def test_inverse_frequencies_of_old_checkpoints_are_ignored(saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(saved, lambda tensors: tensors.update({name: torch.ones(4)}))
    load_model(str(saved))


def test_broken_weight_files(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(SetupError, match="cannot be read as safetensors"):
        load_model(str(saved))
    path.write_bytes(whole[:-8])
    with pytest.raises(SetupError, match="cannot be read as safetensors"):
        load_model(str(saved))
    path.unlink()
    with pytest.raises(SetupError, match="only safetensors"):
        load_model(str(saved))
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(SetupError, match="is missing"):
        load_model(str(saved))
    index.write_text("{}")
    with pytest.raises(SetupError, match="cannot be read"):
        load_model(str(saved))


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(UnknownModel, match="no such directory"):
        find_model(str(tmp_path / "nowhere"))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UnknownModel, match="neither a directory nor"):
        find_model(str(tmp_path / "model.bin"))
    with pytest.raises(UnknownModel, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_settings_that_make_no_sense(saved):
    with pytest.raises(SetupError, match="float8"):
        load_model(str(saved), dtype="float8")
    with pytest.raises(SetupError, match="load_format"):
        load_model(str(saved), load_format="pickle")
    with pytest.raises(UnknownModel, match="known: 8b, 1b"):
        load_model("70b", load_format="dummy")


def test_random_weights_in_the_shape_of_a_directory(saved):
    (saved / "model.safetensors").unlink()
    model = load_model(str(saved), load_format="dummy")
    assert (model.config.hidden_size, model.config.num_layers) == (32, 2)
    assert model.base_weight is None


def test_a_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a gguf file at all")
    with pytest.raises(SetupError, match="cannot be read as GGUF"):
        load_model(str(path))


def test_dummy_shapes_and_weights():
    assert DUMMY_CONFIGS["8b"].num_layers == 32
    assert DUMMY_CONFIGS["1b"].tie_word_embeddings
    shapes = weight_shapes(DUMMY_CONFIGS["1b"])
    names = ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"]
    first, again = (
        dummy_weights(shapes, torch.float32, torch.device("cpu"), seed=3) for _ in range(2)
    )
    weight = first(names[0])
    assert weight.shape == (512, 2048)
    assert torch.equal(weight, again(names[0]))
    assert abs(float(weight.std()) - 0.02) < 1e-3
    assert (first(names[1]) == 1).all()
