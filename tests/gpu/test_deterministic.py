"""A deterministic engine on a GPU: a request's logits are the same whatever else is going on."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from tests.engine.tiny_model import (
    ADAPTER_MIXES,
    ADAPTERS,
    ATTENTION,
    MLP,
    make_adapters,
    make_tiny_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VOCAB = 517
NUM_TOKENS = 10
MIXES = [
    *ADAPTER_MIXES,
    {"r16": 1.0},
    {"dora": 1.0},
    {"head": 1.0},
    {},
    {"r16": 1.0},
    {"r16": 1.0},
    {"r8": 1.0},
    {"r64": 1.0},
]
LENGTHS = [1, 15, 16, 17, 33, 40, 63, 64, 65, 20, 9, 300, 255, 256, 257, 600]
EXTRAS = {
    "dora": LoraConfig(r=8, lora_alpha=8, use_dora=True, target_modules=ATTENTION + MLP),
    "head": LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough for sums in several ranges, contexts long enough for several splits."""
    root = tmp_path_factory.mktemp("deterministic")
    make_tiny_model(
        root / "model",
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=1536,
        num_attention_heads=8,
        max_position_embeddings=1024,
        initializer_range=0.06,
    )
    return root / "model", make_adapters(root / "model", root / "adapters", ADAPTERS | EXTRAS)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    return [
        Request(
            prompt_token_ids=torch.randint(3, VOCAB, (length,), generator=generator).tolist(),
            adapters=mix,
            params=SamplingParams(
                max_tokens=NUM_TOKENS,
                temperature=0.8,
                top_p=0.9,
                seed=index,
                logprobs=3,
                ignore_eos=True,
            ),
        )
        for index, (length, mix) in enumerate(zip(LENGTHS, MIXES, strict=True))
    ]


Logits = dict[tuple[int, int], torch.Tensor]
"""By seed, which names the request, and index of the token that they gave."""


class Observed:
    """An engine whose logits are kept."""

    def __init__(self, model, dtype: str = "bfloat16", **settings: object) -> None:
        path, adapters = model
        config = {
            "num_kv_blocks": 400,
            "adapter_pages": (16, 16, 16, 16),
            "adapter_host_bytes": 1 << 26,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
            "deterministic": True,
            **settings,
        }
        self.engine = Engine(EngineConfig(str(path), device="cuda", dtype=dtype, **config))
        for name, directory in adapters.items():
            self.engine.load_adapter(name, directory)
        self.logits: Logits = {}
        drawn = self.engine._runner._drawn
        draw = drawn.draw

        def keep(logits, sampling):
            for row, kept in zip(sampling, logits.clone(), strict=True):
                # The step launched ahead of a request's last token computes one that nobody gets.
                if row.output_index < NUM_TOKENS:
                    self.logits[row.seed, row.output_index] = kept[:VOCAB]
            return draw(logits, sampling)

        drawn.draw = keep

    def run(self, requests: list[Request]) -> dict[int, object]:
        """All at once; what each gave, by its seed."""
        completions = self.engine.generate(requests)
        assert all(completion.error is None for completion in completions)
        return {
            request.params.seed: (list(done.token_ids), done.logprobs)
            for request, done in zip(requests, completions, strict=True)
        }

    def run_apart(self, requests: list[Request]) -> None:
        """One joins every second step: rows decode in graphs and beside prefills by turns."""
        waiting, steps = list(requests), 0
        while waiting or self.engine.has_work():
            if waiting and steps % 2 == 0:
                self.engine.add(waiting.pop(0))
            self.engine.step()
            steps += 1


@pytest.fixture(scope="module")
def alone(model, requests):
    """What each request gives with the engine to itself."""
    observed = Observed(model)
    done: dict[int, object] = {}
    for request in requests:
        done |= observed.run([request])
    observed.engine.close()
    return observed.logits, done


def assert_equal(logits: Logits, expected: Logits) -> None:
    assert logits.keys() == expected.keys()
    wrong = [key for key in sorted(logits) if not torch.equal(logits[key], expected[key])]
    assert not wrong, f"(request, token) with other logits: {wrong}"


SETTINGS: dict[str, dict[str, object]] = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 24},
    "chunks of one": {"max_num_batched_tokens": 16},
    "preempted": {"num_kv_blocks": 70},
    "few seats": {"max_num_seqs": 3},
    "prefixes cached": {"enable_prefix_caching": True},
    "other room": {"adapter_pages": (40, 40, 40, 40), "num_kv_blocks": 900},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_together_is_as_alone(model, requests, alone, name) -> None:
    observed = Observed(model, **SETTINGS[name])
    done = observed.run(requests)
    assert_equal(observed.logits, alone[0])
    assert done == alone[1]
    # In another order; what was prefilled is in the cache now, where there is one.
    observed.logits.clear()
    assert observed.run(requests[::-1]) == done
    assert_equal(observed.logits, alone[0])
    observed.engine.check_integrity()
    observed.engine.close()


def test_joining_one_by_one_is_as_alone(model, requests, alone) -> None:
    observed = Observed(model)
    observed.run_apart(requests)
    assert_equal(observed.logits, alone[0])
    observed.engine.close()


def test_a_generation_goes_on_elsewhere_as_if_nothing_had_been(model, requests, alone) -> None:
    observed = Observed(model)
    resumed = [
        Request(
            prompt_token_ids=request.prompt_token_ids,
            adapters=request.adapters,
            params=request.params,
            output_token_ids=alone[1][request.params.seed][0][:4],
        )
        for request in requests
    ]
    observed.run(resumed)
    assert_equal(observed.logits, {key: row for key, row in alone[0].items() if key[1] >= 4})
    observed.engine.close()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_in_other_types(model, requests, dtype) -> None:
    some = requests[:9]
    observed = Observed(model, dtype)
    together = observed.run(some)
    logits = dict(observed.logits)
    observed.logits.clear()
    for request in some:
        assert observed.run([request]) == {request.params.seed: together[request.params.seed]}
    assert_equal(observed.logits, logits)
    observed.engine.close()


def test_it_computes_what_the_usual_kernels_compute(model, requests, alone) -> None:
    observed = Observed(model, deterministic=False)
    observed.run(requests)
    errors = [
        (observed.logits[index, 0].float() - alone[0][index, 0].float()).abs().max()
        / alone[0][index, 0].float().abs().max()
        for index in range(len(requests))
    ]
    print(f"largest difference to the usual kernels: {max(errors):.4f} of the largest logit")
    assert max(errors) < 0.1
    observed.engine.close()
