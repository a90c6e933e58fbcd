"""Weighted sums of adapters whose extras add up: token by token as weights that were summed."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.errors import AdapterFailed
from tests.engine.test_extras import ADAPTERS, NUM_TOKENS, base_model, greedy, save_adapter
from tests.engine.tiny_model import assert_same_tokens
from tests.models.tiny_families import FAMILIES, VOCAB_SIZE

SUMS = [
    {"bias all": 0.5},
    {"bias all": 0.5, "plain": -0.7},
    {"bias lora_only": 0.6, "bias all": 0.8},
    {"lora_bias": 1.5, "bias lora_only": 0.5},
    {"embeddings": 0.4},
    {"embeddings": 0.6, "head alone": 0.7, "plain": 0.5},
    {"head alone": 1.0, "bias all": 1.0},
]
NAMES = sorted({name for weights in SUMS for name in weights} | {"whole", "dora"})


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A model with untied embeddings, adapters, a prompt, and the weights that each one adds."""
    root = tmp_path_factory.mktemp("sums")
    FAMILIES["llama, biases"].save(root / "model")
    base = base_model(root / "model").eval()
    deltas = {}
    for seed, name in enumerate(NAMES):
        config = ADAPTERS[name]
        if name == "whole":
            config = LoraConfig(**{**config.to_dict(), "modules_to_save": ["lm_head", "norm"]})
        save_adapter(base, root / name, config, seed)
        merged = PeftModel.from_pretrained(deepcopy(base), root / name).merge_and_unload()
        deltas[name] = {
            key: value - base.state_dict()[key] for key, value in merged.state_dict().items()
        }
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, VOCAB_SIZE, (14,), generator=generator).tolist()
    return root, base, deltas, prompt


def summed(base, deltas, weights):
    model = deepcopy(base)
    state = model.state_dict()
    for name, weight in weights.items():
        for key, delta in deltas[name].items():
            state[key] += weight * delta
    return model


def test_sums_in_one_batch_are_those_of_the_weights(bench):
    root, base, deltas, prompt = bench
    engine = Engine(EngineConfig(str(root / "model"), device="cpu", adapter_pages=(16,) * 4))
    for name in NAMES:
        engine.register_adapter(name, root / name)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    for _ in range(2):
        ended = engine.generate([Request(prompt, weights, params) for weights in [*SUMS, {}]])
        for weights, completion in zip([*SUMS, {}], ended, strict=True):
            assert completion.error is None, weights
            wanted = greedy(summed(base, deltas, weights), prompt)
            assert_same_tokens(completion.token_ids, wanted, weights)
    engine.check_integrity()
    engine.close()


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"whole": 0.5}, "'whole' has whole norms and a whole lm_head"),
        ({"dora": 1.0, "bias all": 1.0}, "'dora' has DoRA"),
    ],
)
def test_what_has_no_exact_sum_is_refused_with_the_reason(bench, weights, reason):
    root, _, _, prompt = bench
    engine = Engine(EngineConfig(str(root / "model"), device="cpu", adapter_pages=(8,) * 4))
    for name in weights:
        engine.register_adapter(name, root / name)
    (ended,) = engine.generate([Request(prompt, weights, SamplingParams(max_tokens=2))])
    assert isinstance(ended.error, AdapterFailed)
    assert reason in ended.error.message
    assert "use it alone, with weight 1" in ended.error.message
    engine.close()
