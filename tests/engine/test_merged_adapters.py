"""Requests that merge adapters give PEFT's tokens, beside others in one batch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from openlora.adapters.merge_spec import MergeSpec
from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.errors import AdapterFailed, InvalidRequest, UnknownAdapter
from tests.adapters.peft_dirs import edit_tensors
from tests.engine.tiny_model import (
    VOCAB_SIZE,
    Reference,
    assert_same_tokens,
    make_adapters,
    make_tiny_model,
)

NUM_TOKENS = 10
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)

MERGES = [
    ({"r8": 0.6, "rs": 0.8}, MergeSpec("linear")),
    ({"r8": 0.6, "r4": 0.8, "r16": -0.5}, MergeSpec("svd")),
    ({"r8": 0.9, "rs": 0.8}, MergeSpec("ties", 0.5)),
    ({"r16": 0.9, "r4": 0.8}, MergeSpec("ties_svd", 0.4, "frequency")),
    ({"r8": 0.9, "r16": 0.8}, MergeSpec("magnitude_prune_svd", 0.5)),
    ({"r8": 0.9, "rs": -0.8}, MergeSpec("magnitude_prune", 0.5)),
    ({"r8": 0.5, "rs": 0.5}, MergeSpec()),
    ({"r8": 1.0}, MergeSpec("linear")),
    ({}, MergeSpec()),
]


class MergingReference(Reference):
    """PEFT's own merges."""

    def merged(self, mix, spec):
        if spec.method == "cat" or len(mix) < 2:
            return mix
        name = f"{spec.method}{len(self._model.peft_config)}"
        self._model.add_weighted_adapter(
            *([*mix], [*mix.values()], name),
            combination_type=spec.method,
            density=spec.density,
            majority_sign_method=spec.majority_sign,
        )
        self._model.eval()
        return {name: 1.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_tiny_model(root / "model")
    return root / "model", make_adapters(root / "model", root / "adapters")


@pytest.fixture
def engine(tiny):
    model_dir, adapters = tiny
    made = Engine(
        EngineConfig(
            str(model_dir),
            device="cpu",
            dtype="float32",
            num_kv_blocks=128,
            adapter_pages=(24, 24, 24, 24),
        )
    )
    for name, path in adapters.items():
        made.register_adapter(name, path)
    yield made
    made.check_integrity()
    made.close()


def prompt(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, VOCAB_SIZE, (9 + number,), generator=generator).tolist()


def test_a_mixed_batch_of_merges_gives_the_tokens_of_peft(tiny, engine):
    reference = MergingReference(*tiny)
    requests = [Request(prompt(i), mix, PARAMS, merge=m) for i, (mix, m) in enumerate(MERGES)]
    for _ in range(2):  # made, and then found resident
        completions = engine.generate(requests)
        for request, completion in zip(requests, completions, strict=True):
            assert completion.error is None
            name = reference.merged(request.adapters, request.merge)
            wanted = reference.greedy(request.prompt_token_ids, name, NUM_TOKENS)
            assert_same_tokens(completion.token_ids, wanted, request.merge)
    resident = engine.stats().resident_adapters
    assert sum(name.startswith("merged-") for name in resident) == 6


def test_eight_adapters_are_merged(tiny, engine):
    _, adapters = tiny
    for number in range(8):
        engine.register_adapter(f"n{number}", adapters["r8"])
    mix = {f"n{number}": 0.125 for number in range(8)}
    merge, alone = engine.generate(
        [
            Request(prompt(3), mix, PARAMS, merge=MergeSpec("svd")),
            Request(prompt(3), {"r8": 1.0}, PARAMS),
        ]
    )
    assert merge.token_ids == alone.token_ids


def test_a_merge_that_cannot_be_made_fails_alone(engine):
    bad = Request(prompt(1), {"r8": 1.0, "r16": 1.0}, PARAMS, merge=MergeSpec("linear"))
    good = Request(prompt(1), {"r8": 1.0}, PARAMS)
    failed, done = engine.generate([bad, good])
    assert isinstance(failed.error, AdapterFailed)
    assert "needs adapters of one rank; these have 8, 16" in str(failed.error)
    assert len(done.token_ids) == NUM_TOKENS
    with pytest.raises(UnknownAdapter, match="'nobody' is not registered"):
        engine.add(Request([5], {"r8": 1.0, "nobody": 1.0}, PARAMS, merge=MergeSpec("svd")))
    with pytest.raises(InvalidRequest, match="merge method is 'mean'"):
        engine.add(Request([5], {"r8": 1.0}, PARAMS, merge=MergeSpec("mean")))


def test_a_merge_directory_that_cannot_be_written_fails_the_request_alone(engine, monkeypatch):
    monkeypatch.setattr(engine._names, "_root", Path("/proc/merges"))
    mix = {"r8": 1.0, "rs": 0.77}
    with pytest.raises(AdapterFailed, match="the merge cannot be kept in /proc/merges"):
        engine.add(Request(prompt(1), mix, PARAMS, merge=MergeSpec("linear")))
    (done,) = engine.generate([Request(prompt(1), {"r8": 1.0}, PARAMS)])
    assert done.error is None


def test_files_that_changed_in_place_are_loaded_anew(tiny, engine, tmp_path):
    _, adapters = tiny
    path = shutil.copytree(adapters["r8"], tmp_path / "changing")
    merge = MergeSpec("svd")

    def tokens():
        engine.load_adapter("changing", path)
        requests = [
            Request(prompt(4), {"changing": 1.0}, PARAMS),
            Request(prompt(4), {"changing": 1.0, "r4": 0.5}, PARAMS, merge=merge),
        ]
        return [completion.token_ids for completion in engine.generate(requests)]

    before = tokens()
    assert tokens() == before
    edit_tensors(path, lambda tensors: [tensor.mul_(-3) for tensor in tensors.values()])
    edit_tensors(path, lambda tensors: [t.mul_(0.5) for n, t in tensors.items() if "lora_A" in n])
    after = tokens()
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_merges_not_asked_for_are_forgotten(engine, monkeypatch):
    monkeypatch.setattr("openlora.engine.adapter_names.MAX_MERGES", 2)
    for weight in (0.1, 0.2, 0.3):
        mix = {"r8": 1.0, "rs": weight}
        (done,) = engine.generate([Request(prompt(2), mix, PARAMS, merge=MergeSpec("linear"))])
        assert done.error is None
    resident = engine.stats().resident_adapters
    assert sum(name.startswith("merged-") for name in resident) == 2
