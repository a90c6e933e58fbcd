"""Every supported model family on a GPU: the engine's greedy tokens are those of transformers."""

from __future__ import annotations

import pytest
import torch

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from tests.models.tiny_families import FAMILIES, VOCAB_SIZE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NUM_TOKENS = 12
NEAR_TIE = 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_whole_and_in_chunks(tmp_path, name) -> None:
    reference = FAMILIES[name].save(tmp_path)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (45, 51)]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    for budget in (512, 16):
        config = EngineConfig(
            str(tmp_path),
            device="cuda",
            dtype="float32",
            num_kv_blocks=20,
            adapter_pages=(0, 0, 0, 0),
            adapter_host_bytes=0,
            max_num_seqs=2,
            max_num_batched_tokens=budget,
        )
        engine = Engine(config)
        for prompt, completion in zip(
            prompts,
            engine.generate([Request(prompt_token_ids=p, params=params) for p in prompts]),
            strict=True,
        ):
            assert completion.error is None
            tokens = completion.token_ids
            logits = reference(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0]
            top = logits[len(prompt) - 1 :].topk(2)
            for token, best, values in zip(
                tokens, top.indices[:, 0].tolist(), top.values, strict=True
            ):
                assert token == best or float(values[0] - values[1]) < NEAR_TIE
