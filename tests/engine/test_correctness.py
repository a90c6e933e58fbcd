"""Greedy tokens in fp32 equal those of transformers + PEFT, whatever shares the batch.

Each way of computing the same thing is one engine setting: whole prompts, chunked prefill, a block
pool so small that requests are preempted, prefix cache hits, resuming in the middle.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from tests.engine.tiny_model import (
    ADAPTER_MIXES,
    VOCAB_SIZE,
    Greedy,
    Reference,
    assert_same_tokens,
    make_adapters,
    make_tiny_model,
)

pytestmark = pytest.mark.usefixtures("two_threads")

NUM_TOKENS = 14

MIXES = [
    *ADAPTER_MIXES,
    {},
    {"r16": 1.0},
    {"r8": 0.5},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_tiny_model(root / "model")
    adapters = make_adapters(root / "model", root / "adapters")
    return root / "model", adapters


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 5, 15, 16, 17, 33, 40, 21, 31, 32, 3]
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def reference(tiny) -> Reference:
    return Reference(*tiny)


@pytest.fixture(scope="module")
def expected(reference, prompts) -> list[Greedy]:
    return [
        reference.greedy(prompt, mix, NUM_TOKENS)
        for prompt, mix in zip(prompts, MIXES, strict=True)
    ]


@pytest.fixture(params=["auto", "torch"])
def make_engine(tiny, request):
    model_dir, adapters = tiny
    engines = []

    def make(**settings) -> Engine:
        settings.setdefault("num_kv_blocks", 128)
        settings.setdefault("adapter_pages", (24, 24, 24, 24))
        settings.setdefault("cpu_kernels", request.param)
        engine = Engine(EngineConfig(str(model_dir), device="cpu", dtype="float32", **settings))
        for name, path in adapters.items():
            engine.load_adapter(name, path)  # now, for schedules that do not vary from run to run
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def requests(prompts, **params) -> list[Request]:
    settings = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True} | params
    return [
        Request(prompt, mix, SamplingParams(**settings))
        for prompt, mix in zip(prompts, MIXES, strict=True)
    ]


def check(completions, expected) -> None:
    for completion, wanted, mix in zip(completions, expected, MIXES, strict=True):
        assert completion.error is None
        assert_same_tokens(completion.token_ids, wanted, mix)


def test_adapters_change_the_tokens(expected, reference, prompts):
    base = reference.greedy(prompts[4], {}, NUM_TOKENS)
    assert base.token_ids != expected[4].token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 11, "max_num_seqs": 11},
        {"max_num_seqs": 3},
        {"block_size": 4, "num_kv_blocks": 512},
        {"num_kv_blocks": 9, "enable_prefix_caching": False},
        {"num_kv_blocks": 9, "max_num_batched_tokens": 13, "max_num_seqs": 13},
        {"adapter_pages": (7, 7, 7, 7)},
    ],
    ids=["plain", "chunked", "few-seats", "small-blocks", "preempted", "tight", "few-pages"],
)
def test_a_mixed_batch_gives_the_tokens_of_peft(make_engine, settings, prompts, expected):
    engine = make_engine(**settings)
    check(engine.generate(requests(prompts)), expected)
    engine.check_integrity()
    if settings.get("num_kv_blocks") == 9:
        assert engine.stats().preemptions > 0


def test_prefix_cache_hits_give_the_same_tokens(make_engine, prompts, expected):
    engine = make_engine()
    check(engine.generate(requests(prompts)), expected)
    check(engine.generate(requests(prompts)), expected)
    assert engine.stats().cached_tokens >= sum((len(p) - 1) // 16 * 16 for p in prompts)


@pytest.mark.parametrize("num_known", [1, 5, NUM_TOKENS - 1])
def test_a_resumed_request_goes_on_with_the_next_token(make_engine, prompts, expected, num_known):
    resumed = [
        replace(request, output_token_ids=wanted.token_ids[:num_known])
        for request, wanted in zip(requests(prompts), expected, strict=True)
    ]
    check(make_engine().generate(resumed), expected)


def test_seeded_sampling_does_not_depend_on_the_batch(make_engine, prompts):
    settings = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "frequency_penalty": 0.3}
    # With this seed no draw is nearer to a tie than fp32 sums in another order differ (1e-5).
    batch = requests(prompts, seed=33, **settings)
    together = make_engine().generate(batch)
    backwards = make_engine(max_num_seqs=4).generate(batch[::-1])[::-1]
    alone = make_engine(max_num_seqs=1)
    for request, one, other in zip(batch, together, backwards, strict=True):
        assert one.token_ids == other.token_ids == alone.generate([request])[0].token_ids
    middle = [
        replace(request, output_token_ids=one.token_ids[:6])
        for request, one in zip(batch, together, strict=True)
    ]
    resumed = make_engine().generate(middle)
    assert [c.token_ids for c in resumed] == [c.token_ids for c in together]
    assert len({c.token_ids for c in together}) == len(together)


def test_logprobs_are_those_of_the_reference(make_engine, reference, prompts):
    engine = make_engine()
    params = SamplingParams(
        max_tokens=6, temperature=1.5, seed=3, logprobs=4, top_k=20, ignore_eos=True
    )
    mix = {"r16": 0.6, "rs": 0.4}
    request_id = engine.add(Request(prompts[5], mix, params))
    outputs = []
    while engine.has_work():
        outputs += engine.step() or []
        engine.wait_for_adapters(1)
    assert {o.request_id for o in outputs} == {request_id}
    tokens = prompts[5] + [o.token_id for o in outputs]
    logprobs = reference.logits(tokens, mix).log_softmax(-1)[len(prompts[5]) - 1 : -1]
    for output, row in zip(outputs, logprobs, strict=True):
        assert output.logprob == pytest.approx(float(row[output.token_id]), abs=1e-3)
        top = row.topk(4)
        assert [token for token, _ in output.top_logprobs] == top.indices.tolist()
        assert [p for _, p in output.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)
