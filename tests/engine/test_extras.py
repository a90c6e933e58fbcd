"""Adapters that are more than low-rank pairs: token by token as PEFT, in one batch with others."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.errors import AdapterFailed
from tests.engine.tiny_model import Greedy, assert_same_tokens
from tests.models.tiny_families import FAMILIES, VOCAB_SIZE

NUM_TOKENS = 6
LINEARS = ["q_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "gate_up_proj", "down_proj"]
ADAPTERS = {
    "plain": LoraConfig(r=8, lora_alpha=8, target_modules=LINEARS),
    "dora": LoraConfig(r=8, lora_alpha=8, target_modules=LINEARS, use_dora=True),
    "dora rs": LoraConfig(
        r=20, lora_alpha=4, target_modules=["down_proj"], use_dora=True, use_rslora=True
    ),
    "bias all": LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"], bias="all"),
    "bias lora_only": LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], bias="lora_only"
    ),
    "lora_bias": LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, lora_bias=True),
    "embeddings": LoraConfig(
        r=6, lora_alpha=12, target_modules=["embed_tokens", "lm_head", "down_proj"]
    ),
    "head alone": LoraConfig(r=6, lora_alpha=12, target_modules=["lm_head"]),
    "whole": LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["down_proj"],
        modules_to_save=["embed_tokens", "lm_head", "norm", "input_layernorm", "q_norm"],
    ),
    "whole dora": LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=LINEARS,
        use_dora=True,
        modules_to_save=["lm_head", "post_attention_layernorm"],
    ),
}


def base_model(model_dir):
    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )


def save_adapter(base, directory, config, seed):
    """With every trained weight random."""
    torch.manual_seed(seed)
    model = get_peft_model(deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_magnitude" in name:
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.6, 1.5))
        elif "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)


@torch.inference_mode()
def greedy(model, prompt):
    tokens, near_tie = list(prompt), None
    for index in range(NUM_TOKENS):
        top = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        if near_tie is None and float(top.values[0] - top.values[1]) < 1e-4:
            near_tie = index
        tokens.append(int(top.indices[0]))
    return Greedy(tokens[len(prompt) :], near_tie)


@pytest.fixture(scope="module", params=["llama, biases", "qwen3", "gemma2", "phi3"])
def bench(request, tmp_path_factory):
    """A model, adapters of every kind, a prompt and PEFT's tokens for each."""
    root = tmp_path_factory.mktemp("extras")
    FAMILIES[request.param].save(root / "model")
    base = base_model(root / "model").eval()
    generator = torch.Generator().manual_seed(2)
    cases = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        prompt = torch.randint(3, VOCAB_SIZE, (9 + 3 * seed,), generator=generator).tolist()
        if "q_norm" in (config.modules_to_save or ()) and request.param != "qwen3":
            config = LoraConfig(**{**config.to_dict(), "modules_to_save": ["lm_head", "norm"]})
        save_adapter(base, root / name, config, seed)
        # PEFT writes biases into the base model for good: a copy for each.
        model = PeftModel.from_pretrained(deepcopy(base), root / name).eval()
        cases[name] = prompt, greedy(model, prompt)
    prompt = torch.randint(3, VOCAB_SIZE, (14,), generator=generator).tolist()
    cases[""] = prompt, greedy(base, prompt)
    return root, cases


def assert_tokens_of_peft(engine, bench, rounds=1):
    """All cases of ``bench`` in one batch, ``rounds`` times, give PEFT's tokens."""
    root, cases = bench
    for name in cases:
        if name:
            engine.load_adapter(name, root / name)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    requests = [
        Request(prompt, {name: 1.0} if name else {}, params) for name, (prompt, _) in cases.items()
    ]
    for _ in range(rounds):
        completions = engine.generate(requests)
        for completion, (name, (_, wanted)) in zip(completions, cases.items(), strict=True):
            assert completion.error is None, (name, completion.error)
            assert_same_tokens(completion.token_ids, wanted, name)


@pytest.mark.parametrize(("cpu_kernels", "budget"), [("torch", 11), ("auto", 512)])
def test_every_kind_in_one_batch_gives_the_tokens_of_peft(bench, cpu_kernels, budget):
    root, _ = bench
    engine = Engine(
        EngineConfig(
            str(root / "model"),
            device="cpu",
            cpu_kernels=cpu_kernels,
            num_kv_blocks=96,
            adapter_pages=(16,) * 4,
            max_num_seqs=11,
            max_num_batched_tokens=budget,
        )
    )
    assert_tokens_of_peft(engine, bench, rounds=2)  # the second time from the prefix cache
    engine.check_integrity()
    engine.close()


def test_no_ensemble_of_what_cannot_be_added_up(bench):
    root, cases = bench
    engine = Engine(EngineConfig(str(root / "model"), device="cpu", adapter_pages=(8,) * 4))
    for name in ("plain", "dora"):
        engine.register_adapter(name, root / name)
    prompt = cases["plain"][0]
    params = SamplingParams(max_tokens=2, temperature=0)
    mixes = [{"dora": 0.5}, {"dora": 1.0, "plain": 1.0}, {"dora": 1.0}, {"plain": 0.5}]
    ended = engine.generate([Request(prompt, mix, params) for mix in mixes])
    assert [completion.error is None for completion in ended] == [False, False, True, True]
    for completion in ended[:2]:
        assert isinstance(completion.error, AdapterFailed)
        assert "'dora' has DoRA, of which there is no exact" in completion.error.message
    engine.close()
