"""Every family through the engine: greedy tokens in fp32 equal those of transformers + PEFT.

Prompts are shorter and longer than the window, adapters are mixed in one batch, and each is
computed whole, in chunks, from the prefix cache, and again after a preemption.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from tests.engine.tiny_model import Reference, assert_same_tokens, make_adapters
from tests.models.tiny_families import FAMILIES, VOCAB_SIZE

NUM_TOKENS = 8
ADAPTERS = {
    "all": LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"),
    "some": LoraConfig(r=20, lora_alpha=10, target_modules=["q_proj", "qkv_proj", "down_proj"]),
}
MIXES: list[dict[str, float]] = [
    {"all": 1.0},
    {},
    {"some": 1.0},
    {"all": 0.5, "some": -0.5},
    {"all": 1.0},
]
LENGTHS = [5, 8, 17, 33, 40]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixed_batch_gives_the_tokens_of_peft(tmp_path, name):
    model_dir = tmp_path / "model"
    FAMILIES[name].save(model_dir)
    adapters = make_adapters(model_dir, tmp_path, ADAPTERS)
    reference = Reference(model_dir, adapters)
    generator = torch.Generator().manual_seed(4)
    # Below its first length LongRoPE has other frequencies, which an engine for more never uses.
    shift = 30 if "long" in name else 0
    prompts = [
        torch.randint(3, VOCAB_SIZE, (length + shift,), generator=generator).tolist()
        for length in LENGTHS
    ]
    wanted = [reference.greedy(p, m, NUM_TOKENS) for p, m in zip(prompts, MIXES, strict=True)]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    requests = [Request(p, m, params) for p, m in zip(prompts, MIXES, strict=True)]
    for settings in (
        {},
        {"max_num_batched_tokens": 11, "max_num_seqs": 5},
        {"max_num_batched_tokens": 19, "max_num_seqs": 5, "cpu_kernels": "torch"},
        # Room for four prompts, and for little of what they grow by.
        {"num_kv_blocks": sum(len(p) // 2 + 2 for p in prompts[:4]), "block_size": 2},
    ):
        config = {"num_kv_blocks": 64, "adapter_pages": (8, 8, 8, 8)} | settings
        engine = Engine(EngineConfig(str(model_dir), device="cpu", dtype="float32", **config))
        for adapter, path in adapters.items():
            engine.load_adapter(adapter, path)
        for _ in range(2):  # the second time from the prefix cache
            for completion, want, mix in zip(engine.generate(requests), wanted, MIXES, strict=True):
                assert completion.error is None
                assert_same_tokens(completion.token_ids, want, (name, settings, mix))
        engine.check_integrity()
        if "num_kv_blocks" in settings:
            assert engine.stats().preemptions > 0
        else:
            assert engine.stats().cached_tokens > sum(LENGTHS) / 2
        engine.close()
