"""The engine on a GPU: graphs, eager steps and steps ahead give what transformers + PEFT give."""

from __future__ import annotations

import pytest
import torch

from openlora.engine import Engine, EngineConfig, Request, SamplingParams, step_graphs
from tests.engine.tiny_model import (
    ADAPTER_MIXES,
    VOCAB_SIZE,
    Reference,
    assert_same_tokens,
    make_adapters,
    make_tiny_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NUM_TOKENS = 12
BF16_MEAN_ERROR, BF16_MAX_ERROR = 0.1, 1.0
"""Of log-probabilities in bf16, against transformers + PEFT in fp32."""
MIXES = [
    *ADAPTER_MIXES,
    {"r16": 1.0},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_tiny_model(root / "model")
    return root / "model", make_adapters(root / "model", root / "adapters")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 15, 16, 17, 33, 40, 63, 64, 65]
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def make_engine(tiny, dtype: str = "float32", **settings: object) -> Engine:
    model, adapters = tiny
    config = {
        "num_kv_blocks": 200,
        "adapter_pages": (16, 16, 16, 16),
        "adapter_host_bytes": 1 << 24,
        "max_num_seqs": 9,
        "max_num_batched_tokens": 2048,
        **settings,
    }
    engine = Engine(EngineConfig(str(model), device="cuda", dtype=dtype, **config))
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    return engine


def requests_of(prompts: list[list[int]], params: SamplingParams) -> list[Request]:
    return [
        Request(prompt_token_ids=prompt, adapters=mix, params=params)
        for prompt, mix in zip(prompts, MIXES, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 24},
        {"num_kv_blocks": 20},
        {"max_num_seqs": 3},
        {"max_graph_tokens": 600},
        {"max_graph_tokens": 200, "max_num_batched_tokens": 200},
    ],
    ids=["whole", "chunked", "preempted", "few seats", "in graphs", "chunked in graphs"],
)
def test_greedy_equals_transformers_and_peft(tiny, prompts, settings) -> None:
    reference = Reference(*tiny)
    engine = make_engine(tiny, **settings)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    completions = engine.generate(requests_of(prompts, params))
    for completion, prompt, mix in zip(completions, prompts, MIXES, strict=True):
        assert_same_tokens(completion.token_ids, reference.greedy(prompt, mix, NUM_TOKENS), mix)
    engine.check_integrity()


def test_noise_and_penalties_do_not_depend_on_steps_ahead(tiny, prompts) -> None:
    params = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.8, seed=7, top_k=20, repetition_penalty=1.2, logprobs=2
    )
    together = make_engine(tiny).generate(requests_of(prompts, params))
    engine = make_engine(tiny)
    for request, expected in zip(requests_of(prompts, params), together, strict=True):
        (alone,) = engine.generate([request])
        assert alone.token_ids == expected.token_ids
        assert alone.logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def noted(kinds: set[str], kind: str) -> str:
    kinds.add(kind)
    return kind


def test_repeats_are_bit_equal_and_base_batches_launch_no_lora(tiny, prompts, monkeypatch) -> None:
    kind_of = step_graphs._kind
    engine = make_engine(tiny, dtype="bfloat16", enable_prefix_caching=False)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, logprobs=1, ignore_eos=True)
    base = [Request(prompt_token_ids=prompt, params=params) for prompt in prompts]
    kinds: set[str] = set()
    monkeypatch.setattr(step_graphs, "_kind", lambda plan: noted(kinds, kind_of(plan)))
    engine.generate(base)
    assert kinds == {"none"}
    first = engine.generate(requests_of(prompts, params))
    assert "distinct" in kinds
    second = engine.generate(requests_of(prompts, params))
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    assert [c.logprobs for c in first] == [c.logprobs for c in second]


def test_bf16_log_probabilities_are_near_those_of_transformers_and_peft(tiny, prompts) -> None:
    reference = Reference(*tiny)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, logprobs=1, ignore_eos=True)
    completions = make_engine(tiny, dtype="bfloat16").generate(requests_of(prompts, params))
    errors = []
    for completion, prompt, mix in zip(completions, prompts, MIXES, strict=True):
        tokens = list(completion.token_ids)
        logits = reference.logits([*prompt, *tokens[:-1]], mix)[len(prompt) - 1 :]
        expected = logits.log_softmax(-1)[torch.arange(NUM_TOKENS), tokens]
        errors.append((torch.tensor(completion.logprobs) - expected).abs())
    worst = torch.stack(errors)
    # Weights of this model are large (its logits reach ±20), so an ulp of bf16 is much.
    print(f"bf16 against fp32: largest error {worst.max():.3f}, mean {worst.mean():.4f}")
    assert float(worst.mean()) < BF16_MEAN_ERROR
    assert float(worst.max()) < BF16_MAX_ERROR


@pytest.mark.parametrize("max_graph_tokens", [0, 600])
@torch.inference_mode()
def test_replay_equals_eager_bit_for_bit(tiny, prompts, monkeypatch, max_graph_tokens) -> None:
    engine = make_engine(tiny, dtype="bfloat16", max_graph_tokens=max_graph_tokens)
    graphs = engine._runner._graphs
    run, steps, compared = graphs.run, graphs._steps, []

    def run_both(inputs, plan):
        step = run(inputs, plan)
        replayed = step.sampled(step.logits).clone(), step.sampled(step.token_ids).clone()
        # The same buffers again, outside the graph: KV of the step is written over with itself.
        tokens_before = steps._drawn.clone()
        bucket, kind = steps.nearest(len(inputs.token_ids), step_graphs._kind(plan))
        eager = steps.forward(bucket, steps.ops(bucket, kind), steps.scratch(bucket))
        for again, of_graph in zip(eager, replayed, strict=True):
            assert torch.equal(step.sampled(again), of_graph)
        assert torch.equal(steps._drawn, tokens_before)
        compared.append(len(inputs.token_ids) - len(inputs.spans))
        return step

    monkeypatch.setattr(graphs, "run", run_both)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    engine.generate(requests_of(prompts, params))
    assert len(compared) >= NUM_TOKENS - 2
    assert any(compared) == bool(max_graph_tokens)


def test_split_contexts_do_not_share_memory_with_what_comes_later(tiny) -> None:
    generator = torch.Generator().manual_seed(9)
    prompt = torch.randint(3, VOCAB_SIZE, (200,), generator=generator).tolist()
    engine = make_engine(tiny, max_num_seqs=2)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    request = Request(prompt_token_ids=prompt, adapters={"r16": 1.0}, params=params)
    (first,) = engine.generate([request])
    # Had the graph's scratch been given back, these would take it, and the counters in it.
    taken = [torch.full((size,), 77, dtype=torch.int32, device="cuda") for size in (1, 64, 4096)]
    (second,) = engine.generate([request])
    assert second.token_ids == first.token_ids
    assert all(bool((tensor == 77).all()) for tensor in taken)
    assert_same_tokens(first.token_ids, Reference(*tiny).greedy(prompt, {"r16": 1.0}, NUM_TOKENS))
