"""Every form in which PEFT saves plain LoRA gives PEFT's tokens, all of them in one batch."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from openlora.adapters.peft_format import inspect_adapter
from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import edit_config
from tests.engine.tiny_model import (
    ATTENTION,
    MLP,
    VOCAB_SIZE,
    Reference,
    assert_same_tokens,
    make_adapters,
    make_tiny_model,
)

ALL = ATTENTION + MLP
NUM_TOKENS = 8
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
WEIGHTS = "adapter_model.safetensors"

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|o_proj)))"
)

FORMATS = {
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ALL,
        rank_pattern={"k_proj": 20, "layers.1.mlp.down_proj": 2, r"model\.layers\.0\..*q_proj": 1},
        alpha_pattern={"up_proj": 32, "layers.0.self_attn.v_proj": 1},
    ),
    "rslora patterns": LoraConfig(
        r=9,
        lora_alpha=3,
        target_modules=ATTENTION,
        use_rslora=True,
        rank_pattern={r"q_proj|o_proj": 17},
        alpha_pattern={"self_attn.o_proj": 6},
    ),
    "one layer": LoraConfig(r=8, lora_alpha=16, target_modules=ALL, layers_to_transform=0),
    "layers": LoraConfig(
        r=8, lora_alpha=16, target_modules=ALL, layers_to_transform=[1], layers_pattern="layers"
    ),
    "layers, patterns": LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=ALL,
        layers_to_transform=[0, 5],
        layers_pattern=["h", "lay.rs"],
    ),
    "exclude list": LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        exclude_modules=["down_proj", "model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"],
    ),
    "exclude regex": LoraConfig(
        r=8, lora_alpha=16, target_modules=ALL, exclude_modules=r".*\.0\.mlp\..*"
    ),
    "regex": LoraConfig(
        r=8, lora_alpha=16, target_modules=r".*\.1\.(self_attn|mlp)\.(q|up|down)_proj"
    ),
    "all-linear": LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"),
    "whole names": LoraConfig(
        r=8, lora_alpha=8, target_modules=["model.layers.1.mlp.up_proj", "0.self_attn.v_proj"]
    ),
    "fan_in_fan_out": LoraConfig(r=8, lora_alpha=16, target_modules=ALL, fan_in_fan_out=True),
    "unsloth": LoraConfig(r=8, lora_alpha=16, target_modules=UNSLOTH, task_type="CAUSAL_LM"),
    "dropout, gaussian": LoraConfig(
        r=8, lora_alpha=16, target_modules=ALL, lora_dropout=0.3, init_lora_weights="gaussian"
    ),
}


def base_model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def converted(model_dir, root, init):
    """PiSSA and OLoRA change the base; saved with their start they become plain LoRA."""
    torch.manual_seed(3)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=ALL, init_lora_weights=init)
    model = get_peft_model(base_model(model_dir), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(root / "init")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(root / init, path_initial_model_for_weight_conversion=str(root / "init"))
    return root / init


def rewritten(source, directory, change):
    """The same adapter in other files."""
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    change(load_file(source / WEIGHTS), directory)
    return directory


def write_shards(tensors, directory):
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:9], names[9:]), start=1):
        file = f"adapter_model-{number:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_tiny_model(root / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on fan_in_fan_out
        paths = make_adapters(root / "model", root / "adapters", FORMATS)
    for init in ("pissa", "olora"):
        paths[init] = converted(root / "model", root / init, init)
    plain = paths["all-linear"]
    for dtype in (torch.float16, torch.bfloat16):
        paths[str(dtype).replace(".", " ")] = rewritten(
            plain,
            root / str(dtype),
            lambda tensors, to, dtype=dtype: save_file(
                {name: tensor.to(dtype) for name, tensor in tensors.items()}, to / WEIGHTS
            ),
        )
    edit_config(
        paths["unsloth"],
        auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
        base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit",
    )
    ours = dict(paths)
    ours["sharded"] = rewritten(plain, root / "sharded", write_shards)
    ours["named by adapter"] = rewritten(
        plain,
        root / "named",
        lambda tensors, to: save_file(
            {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}, to / WEIGHTS
        ),
    )
    return root / "model", paths, ours


def test_every_format_gives_the_tokens_of_peft_in_one_batch(tiny):
    model_dir, paths, ours = tiny
    reference = Reference(model_dir, paths)
    generator = torch.Generator().manual_seed(2)
    prompts = {
        name: torch.randint(3, VOCAB_SIZE, (7 + i,), generator=generator).tolist()
        for i, name in enumerate(ours)
    }
    config = EngineConfig(
        str(model_dir), device="cpu", dtype="float32", num_kv_blocks=128, adapter_pages=(48,) * 4
    )
    engine = Engine(config)
    for name, path in ours.items():
        engine.register_adapter(name, path)
    requests = [Request(prompt, {name: 1.0}, PARAMS) for name, prompt in prompts.items()]
    base = engine.generate([Request(prompt, {}, PARAMS) for prompt in prompts.values()])
    changed = 0
    for name, done, plain in zip(ours, engine.generate(requests), base, strict=True):
        assert done.error is None, (name, done.error)
        theirs = "all-linear" if name in ("sharded", "named by adapter") else name
        wanted = reference.greedy_given(prompts[name], done.token_ids, {theirs: 1.0})
        assert_same_tokens(done.token_ids, wanted, name)
        changed += done.token_ids != plain.token_ids
    assert changed >= len(ours) - 2
    engine.check_integrity()
    engine.close()


def test_loftq_is_plain_lora_on_the_base_that_was_saved_with_it(tiny, tmp_path):
    """As PEFT's example saves it: W ≈ Q + BA with Q quantised, Q as the base model, the adapter
    with init_lora_weights true. (PEFT's own initialisation needs bitsandbytes.)"""
    model_dir, _, _ = tiny
    base = base_model(model_dir)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=ALL))
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                weight = module.base_layer.weight
                step = weight.abs().max() / 7
                quantised = (weight / step).round() * step
                u, s, vh = torch.linalg.svd(weight - quantised, full_matrices=False)
                module.lora_B["default"].weight.copy_(u[:, :8] * s[:8])
                module.lora_A["default"].weight.copy_(vh[:8])
                weight.copy_(quantised)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    reference = Reference(tmp_path / "base", {"loftq": tmp_path / "adapter"})
    engine = Engine(
        EngineConfig(str(tmp_path / "base"), device="cpu", dtype="float32", num_kv_blocks=32)
    )
    engine.load_adapter("loftq", tmp_path / "adapter")
    prompt = [5, 9, 22, 31, 7]
    (done,) = engine.generate([Request(prompt, {"loftq": 1.0}, PARAMS)])
    assert_same_tokens(done.token_ids, reference.greedy(prompt, {"loftq": 1.0}, NUM_TOKENS))
    edit_config(tmp_path / "adapter", init_lora_weights="loftq")
    with pytest.raises(AdapterFailed, match="serve the base model that was saved with the adapter"):
        engine.load_adapter("again", tmp_path / "adapter")
    engine.close()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is not supported"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA; only LORA"),
        ({"peft_type": "VERA"}, "peft_type is VERA"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is PROMPT_TUNING"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"layers_pattern": [3]}, r"layers_pattern is \[3\]"),
        ({"layers_pattern": "(a+)+b"}, "could take very long"),
    ],
)
def test_what_is_not_served_is_named(tiny, tmp_path, fields, says):
    _, paths, _ = tiny
    copy = rewritten(
        paths["all-linear"], tmp_path / "copy", lambda tensors, to: save_file(tensors, to / WEIGHTS)
    )
    edit_config(copy, **fields)
    with pytest.raises(AdapterFailed, match=says):
        inspect_adapter(copy)
