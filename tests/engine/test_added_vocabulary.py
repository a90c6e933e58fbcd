"""Adapters that bring tokens of their own: as PEFT on a resized model, in batches with others."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.errors import AdapterFailed, InvalidRequest
from tests.engine.test_extras import NUM_TOKENS, base_model, greedy
from tests.engine.tiny_model import assert_same_tokens
from tests.models.tiny_families import FAMILIES, VOCAB_SIZE

Q_DOWN = ["q_proj", "qkv_proj", "down_proj"]
WHOLE = ["embed_tokens", "lm_head"]
ADAPTERS = {
    "grown": (5, LoraConfig(r=4, lora_alpha=8, target_modules=Q_DOWN)),
    "trained": (3, LoraConfig(r=4, lora_alpha=8, target_modules=Q_DOWN, modules_to_save=WHOLE)),
    "on embeddings": (7, LoraConfig(r=4, lora_alpha=8, target_modules=[*Q_DOWN, *WHOLE])),
    "plain": (0, LoraConfig(r=4, lora_alpha=8, target_modules=Q_DOWN)),
}


def resized(base, num_added):
    model = deepcopy(base)
    if num_added:
        model.resize_token_embeddings(VOCAB_SIZE + num_added, mean_resizing=False)
    return model


def save(base, directory, num_added, config, seed):
    torch.manual_seed(seed)
    model = get_peft_model(resized(base, num_added), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        # Tokens that are likely, so that answers hold some.
        table.weight.data[VOCAB_SIZE:] = torch.randn(num_added, table.weight.shape[1])
    model.save_pretrained(directory)


@pytest.fixture(scope="module", params=["llama, biases", "llama, one kv head, tied", "gemma2"])
def bench(request, tmp_path_factory):
    """A model, adapters, and PEFT's tokens for prompts with tokens of theirs."""
    root = tmp_path_factory.mktemp("added")
    FAMILIES[request.param].save(root / "model")
    base = base_model(root / "model").eval()
    generator = torch.Generator().manual_seed(5)
    cases = {}
    for seed, (name, (num_added, config)) in enumerate(ADAPTERS.items()):
        if name == "on embeddings" and base.config.tie_word_embeddings:
            config = LoraConfig(**{**config.to_dict(), "target_modules": [*Q_DOWN, WHOLE[0]]})
        save(base, root / name, num_added, config, seed)
        model = PeftModel.from_pretrained(resized(base, num_added), root / name).eval()
        prompt = torch.randint(3, VOCAB_SIZE, (8,), generator=generator).tolist()
        prompt[2:2] = range(VOCAB_SIZE, VOCAB_SIZE + num_added)
        cases[name] = prompt, greedy(model, prompt)
    return root, cases


def make_engine(root, **settings):
    return Engine(
        EngineConfig(str(root / "model"), device="cpu", adapter_pages=(8,) * 4, **settings)
    )


@pytest.mark.parametrize(("cpu_kernels", "budget"), [("torch", 8), ("auto", 512)])
def test_mixed_batches_give_the_tokens_of_peft(bench, cpu_kernels, budget):
    root, cases = bench
    engine = make_engine(
        root, cpu_kernels=cpu_kernels, max_num_batched_tokens=budget, max_num_seqs=8
    )
    for name in cases:
        engine.register_adapter(name, root / name)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    for _ in range(2):
        ended = engine.generate(
            [Request(prompt, {name: 1.0}, params) for name, (prompt, _) in cases.items()]
        )
        for completion, (name, (_, wanted)) in zip(ended, cases.items(), strict=True):
            assert completion.error is None, (name, completion.error)
            assert_same_tokens(completion.token_ids, wanted, name)
    assert any(max(wanted.token_ids) >= VOCAB_SIZE for _, wanted in cases.values())
    engine.check_integrity()
    engine.close()


def test_sampling_draws_an_adapters_tokens_for_its_rows_alone(bench):
    root, cases = bench
    engine = make_engine(root)
    for name in cases:
        engine.register_adapter(name, root / name)
    params = SamplingParams(
        max_tokens=8, temperature=5.0, seed=3, ignore_eos=True, top_k=60, logprobs=3,
        repetition_penalty=1.2,
    )  # fmt: skip
    requests = [Request([5, 6], {"plain": 1.0}, params) for _ in range(3)]
    requests += [Request([5, 6], {"grown": 1.0}, params), Request([5, 6], {}, params)]
    ended = engine.generate(requests)
    assert all(completion.error is None for completion in ended)
    for completion in (*ended[:3], ended[4]):
        assert max(completion.token_ids) < VOCAB_SIZE
    assert ended[0].token_ids == ended[1].token_ids
    alone = engine.generate(requests[:1])
    assert alone[0].token_ids == ended[0].token_ids
    engine.close()


def test_tokens_of_nobody_and_sums_are_refused(bench):
    root, _ = bench
    engine = make_engine(root)
    for name in ADAPTERS:
        engine.register_adapter(name, root / name)
    params = SamplingParams(max_tokens=2)
    with pytest.raises(InvalidRequest, match="token IDs of this model"):
        engine.add(Request([VOCAB_SIZE], {}, params))
    beyond, others, mixed = engine.generate(
        [
            Request([5, VOCAB_SIZE + 5], {"grown": 1.0}, params),
            Request([5, VOCAB_SIZE], {"plain": 1.0}, params),
            Request([5], {"grown": 0.5, "plain": 0.5}, params),
        ]
    )
    assert isinstance(beyond.error, InvalidRequest)
    assert f"have {VOCAB_SIZE + 5} tokens" in beyond.error.message
    assert isinstance(others.error, InvalidRequest)
    assert isinstance(mixed.error, AdapterFailed)
    assert "added vocabulary" in mixed.error.message
    engine.close()
