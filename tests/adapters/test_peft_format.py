"""Every refusal of a PEFT directory, with what it says; and what a good one is described as."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from openlora.adapters.peft_format import inspect_adapter, read_layout
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import PREFIX, edit_config, edit_tensors, write_adapter

Q = f"{PREFIX}.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "a")


def refused(directory, says):
    with pytest.raises(AdapterFailed, match=says):
        inspect_adapter(directory)


def test_description(adapter):
    info = inspect_adapter(adapter)
    assert info.rank == 4
    assert info.targets == ("q_proj", "v_proj")
    assert info.base_model == "tiny/base"
    assert info.tensors[f"{Q}.lora_A.weight"] == ("F32", (4, 24))
    assert info.size_bytes == sum(
        (adapter / name).stat().st_size
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert len(info.hash) == 64


def test_hash_follows_content_alone(adapter, tmp_path):
    same = write_adapter(tmp_path / "elsewhere")
    (same / "README.md").write_text("not part of the adapter")
    assert inspect_adapter(same).hash == inspect_adapter(adapter).hash
    edit_tensors(same, lambda tensors: tensors[f"{Q}.lora_A.weight"].add_(1))
    assert inspect_adapter(same).hash != inspect_adapter(adapter).hash


def test_scale_rank_and_their_patterns(tmp_path):
    directory = write_adapter(tmp_path / "a", rank=4)
    edit_config(
        directory,
        lora_alpha=6,
        alpha_pattern={"v_proj": 10, r"layers\.0\.self_attn\.q_proj": 3},
        rank_pattern={"layers.1.self_attn.q_proj": 2},
    )

    def shrink(tensors):
        name = f"{PREFIX}.1.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_A.weight"][:2].clone()
        tensors[f"{name}.lora_B.weight"] = tensors[f"{name}.lora_B.weight"][:, :2].clone()

    edit_tensors(directory, shrink)
    found = {module.name: (module.rank, module.scale) for module in read_layout(directory).modules}
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, 3 / 4),
        "model.layers.1.self_attn.q_proj": (2, 6 / 2),
        "model.layers.0.self_attn.v_proj": (4, 10 / 4),
        "model.layers.1.self_attn.v_proj": (4, 10 / 4),
    }


def test_rslora_divides_by_the_root(tmp_path):
    directory = write_adapter(tmp_path / "a", rank=4, lora_alpha=8, use_rslora=True)
    assert {module.scale for module in read_layout(directory).modules} == {4.0}


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.\d+\.self_attn\.(?:q|v)_proj",
        ["self_attn.q_proj", "v_proj"],
    ],
)
def test_forms_of_target_modules(adapter, targets):
    edit_config(adapter, target_modules=targets)
    assert inspect_adapter(adapter).targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(tmp_path, dtype):
    assert inspect_adapter(write_adapter(tmp_path / "a", dtype=dtype)).rank == 4


def test_sharded_files(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    names = sorted(tensors)
    shards = {
        "adapter_model-00001-of-00002.safetensors": names[:3],
        "adapter_model-00002-of-00002.safetensors": names[3:],
    }
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, adapter / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = adapter / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert set(inspect_adapter(adapter).tensors) == set(names)
    (adapter / "adapter_model-00002-of-00002.safetensors").unlink()
    refused(adapter, "00002-of-00002.safetensors is missing")
    index.write_text(json.dumps({"weight_map": {"x": "../../other.safetensors"}}))
    refused(adapter, "names the file '../../other.safetensors'")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(adapter, "names no files")
    index.write_text("[]")
    refused(adapter, "no usable weight_map")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "q_proj: lora_magnitude_vector is missing"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias together"),
        ({"bias": "some"}, "bias is some; choose one of none, all, lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
        ({"modules_to_save": ["score"]}, "names score; supported: embed_tokens, lm_head and norms"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is lm_head; it must list names"),
        (
            {"target_modules": ["q_proj", "v_proj", "lm_head"]},
            "lm_head: lora_A or lora_B is",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is loftq"),
        ({"some_new_feature": True}, "some_new_feature is not supported"),
        ({"r": 0}, "r is 0; ranks are 1 to"),
        ({"r": "8"}, "r is 8; ranks"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": "big"}, "lora_alpha is big"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, "alpha_pattern is -1000"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern: .* is no regular expression"),
        ({"rank_pattern": {str(n): 4 for n in range(2049)}}, "has 2049 patterns; at most 2048"),
        ({"layers_pattern": "(?P<number>layers)"}, "layers_pattern: .* is no regular expression"),
        ({"base_model_name_or_path": "\ud800"}, r"base_model_name_or_path is \\ud800"),
        ({"base_model_name_or_path": "x" * 1001}, "a name of at most 1000 characters"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path is {'a': 1}"),
        ({"\udfff": 1}, r"field \\udfff is not supported"),
        ({"rank_pattern": ["x"]}, "rank_pattern is no object"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern is -1"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is None"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": [1]}, r"target_modules is \[1\]"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": "(.*a|b+)*x"}, "could take very long"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform is"),
        ({"target_modules": ["v_proj"]}, "q_proj.lora_A.weight is not expected"),
        ({"exclude_modules": ["q_proj"]}, "q_proj.lora_A.weight is not expected"),
        ({"layers_to_transform": [1]}, "layers.0.self_attn.q_proj.lora_A.weight is not expected"),
        ({"r": 8}, r"lora_A has shape \[4, 24\] and lora_B \[32, 4\].*rank 8"),
    ],
)
def test_configurations_that_are_refused(adapter, fields, says):
    edit_config(adapter, **fields)
    refused(adapter, says)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{Q}.lora_magnitude_vector", r"vector \(DoRA\) is not expected"),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            r"\(LoRA on embed_tokens\) is not expected",
        ),
        ("base_model.model.lm_head.lora_A.weight", r"\(LoRA on lm_head\) is not expected"),
        (f"{Q}.bias", r"\(trained biases\) is not expected"),
        (f"{Q}.lora_B.bias", r"\(trained biases\) is not expected"),
        ("base_model.model.model.norm.weight", r"\(a whole norm\) is not expected"),
        ("base_model.model.score.modules_to_save.weight", "is not expected in a LoRA adapter"),
        ("model.layers.0.self_attn.q_proj.weight", "is not expected in a LoRA adapter"),
        (f"{Q}.lora_A.default.weight", "is there twice"),
    ],
)
def test_tensors_that_are_refused(adapter, name, says):
    edit_tensors(adapter, lambda tensors: tensors.update({name: torch.ones(4, 24)}))
    refused(adapter, says)


@pytest.mark.parametrize("matrix", "AB")
def test_half_a_pair(adapter, matrix):
    edit_tensors(adapter, lambda tensors: tensors.pop(f"{Q}.lora_{matrix}.weight"))
    refused(adapter, f"model.layers.0.self_attn.q_proj: lora_{matrix} is missing")


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(4, 24, dtype=torch.float64), "dtype F64; supported: F32, F16, BF16"),
        (torch.zeros(4, 24, 1), r"shape \[4, 24, 1\]; must be 2-D"),
        (torch.zeros(5, 24), r"lora_A has shape \[5, 24\]"),
    ],
)
def test_wrong_dtype_and_dimensions(adapter, tensor, says):
    edit_tensors(adapter, lambda tensors: tensors.update({f"{Q}.lora_A.weight": tensor}))
    refused(adapter, says)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_unread(adapter, name):
    (adapter / "adapter_model.safetensors").rename(adapter / name)
    refused(adapter, f"{name} is a pickle file.*convert to safetensors")


def test_missing_files(adapter, tmp_path):
    refused(tmp_path / "nowhere", "is no directory")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "adapter_model.safetensors is missing")
    (adapter / "adapter_config.json").unlink()
    refused(adapter, "adapter_config.json is missing")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\xff"])
def test_broken_configuration(adapter, content):
    (adapter / "adapter_config.json").write_bytes(content.encode("latin-1"))
    refused(adapter, r"adapter_config\.json")


def test_oversized_configuration(adapter):
    (adapter / "adapter_config.json").write_text(" " * (2 << 20))
    refused(adapter, "is over")


def test_an_adapter_that_is_huge(adapter):
    header = (adapter / "adapter_model.safetensors").read_bytes()
    # sparse: nine gigabytes on no disk
    tensor = {"dtype": "F32", "shape": [9 << 30, 1], "data_offsets": [0, 36 << 30]}
    raw = json.dumps({f"{Q}.lora_A.weight": tensor}).encode()
    with (adapter / "adapter_model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + (36 << 30))
    refused(adapter, "at most 8589934592 are taken")
    (adapter / "adapter_model.safetensors").write_bytes(header)
    inspect_adapter(adapter)


def test_more_tensors_than_any_model_has(adapter):
    names = [f"{PREFIX}.{layer}.self_attn.q_proj" for layer in range(4097)]
    tensors = {f"{name}.lora_{m}.weight": torch.zeros(1, 1) for name in names for m in "AB"}
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(adapter, "hold 8194 tensors; at most 8192 are taken")


def test_no_tensors(adapter):
    save_file({}, adapter / "adapter_model.safetensors")
    refused(adapter, "hold no LoRA tensors")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_the_directory(adapter, tmp_path, name):
    outside = tmp_path / "outside"
    (adapter / name).rename(outside)
    (adapter / name).symlink_to(outside)
    refused(adapter, f"{name} is a link out of")
    inside = adapter / "real"
    outside.rename(inside)
    (adapter / name).unlink()
    (adapter / name).symlink_to("real")
    inspect_adapter(adapter)


def test_a_pipe_instead_of_a_file(adapter):
    (adapter / "adapter_config.json").unlink()
    os.mkfifo(adapter / "adapter_config.json")
    refused(adapter, "adapter_config.json is missing")


def test_needs_no_torch():
    code = (
        "import sys, openlora.adapters.peft_format, openlora.adapters.store;"
        "print({'torch', 'safetensors', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
