"""The real demo model with the real demo adapters gives PEFT's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from openlora.demo.adapters import demo_adapters
from openlora.demo.model import ensure_demo_model
from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.engine.generation import load_tokenizer
from openlora.errors import SetupError
from tests.engine.tiny_model import Reference, assert_same_tokens
from tests.services import skip_or_fail

NUM_TOKENS = 20
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_adapters_give_the_tokens_of_peft():
    try:
        model = ensure_demo_model(Path.home() / ".cache" / "openlora")
    except SetupError as error:
        skip_or_fail(str(error))
    adapters = {path.name: path for path in demo_adapters()}
    mixes = [{}, *({name: 1.0} for name in adapters), {"pirate": 0.6, "haiku": 0.4}]
    tokenizer = load_tokenizer(str(model))
    assert tokenizer is not None
    engine = Engine(EngineConfig(str(model), device="cpu", dtype="float32"))
    for name, path in adapters.items():
        engine.register_adapter(name, path)
    requests = [
        Request(
            tokenizer.encode(PROMPT.format(f"Tell me about the sea, {number}.")).ids,
            mix,
            SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True),
        )
        for number, mix in enumerate(mixes)
    ]
    completions = engine.generate(requests)
    engine.close()
    reference = Reference(model, adapters)
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.token_ids) == NUM_TOKENS
        # One pass instead of one for each token: this model is no toy.
        prompt, tokens = request.prompt_token_ids, completion.token_ids
        wanted = reference.greedy_given(prompt, tokens, request.adapters)
        assert_same_tokens(completion.token_ids, wanted, request.adapters)
    assert len({completion.text for completion in completions}) == len(mixes)
