"""Adapters on their way to a GPU: more of them than pages, copied beside the running steps."""

from __future__ import annotations

import pytest
import torch

from openlora.engine import Request, SamplingParams
from openlora.engine.host_tier import HostMemory
from tests.engine.tiny_model import Reference, assert_same_tokens
from tests.gpu.test_engine import make_engine, prompts, tiny  # noqa: F401 - fixtures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NUM_TOKENS = 10


@pytest.mark.parametrize("host_bytes", [0, 1 << 20, 1 << 28])
def test_adapters_take_turns_in_few_pages(tiny, prompts, host_bytes) -> None:  # noqa: F811
    reference = Reference(*tiny)
    engine = make_engine(
        tiny, adapter_pages=(4, 4, 4, 4), max_num_seqs=3, adapter_host_bytes=host_bytes
    )
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    names = ["r64", "r4", "r8", "r16", "rs"] * 3
    requests = [
        Request(prompt_token_ids=prompts[i % len(prompts)], adapters={name: 1.0}, params=params)
        for i, name in enumerate(names)
    ]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        expected = reference.greedy(request.prompt_token_ids, request.adapters, NUM_TOKENS)
        assert_same_tokens(completion.token_ids, expected, request.adapters)
    engine.check_integrity()
    engine.close()


def test_host_memory_is_pinned() -> None:
    memory = HostMemory(1 << 20, pin=True)  # pinned for as long as it lives
    part = memory.empty(1 << 10)
    assert part is not None
    assert part.is_pinned()
