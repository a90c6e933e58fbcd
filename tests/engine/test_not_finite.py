"""Weights that overflow: their requests end with an error that says so, and no other is touched."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.errors import InternalError
from tests.engine.tiny_model import make_adapters, make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_tiny_model(root / "model")
    adapters = make_adapters(root / "model", root / "adapters")
    # Each value is finite, their product is not.
    path = adapters["r8"] / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path)
    return str(root / "model"), adapters


@pytest.mark.parametrize("cpu_kernels", ["torch", "auto"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_an_adapter_that_overflows_fails_its_own_requests(tiny, cpu_kernels, temperature):
    model_dir, adapters = tiny
    engine = Engine(
        EngineConfig(model_dir, device="cpu", cpu_kernels=cpu_kernels, adapter_pages=(8,) * 4)
    )
    for name in ("r8", "r16"):
        engine.load_adapter(name, adapters[name])
    params = SamplingParams(max_tokens=5, temperature=temperature, seed=1, ignore_eos=True)
    prompt = torch.arange(3, 40).tolist()
    good = [Request(prompt, {"r16": 1.0}, params), Request(prompt, {}, params)]
    alone = [completion.token_ids for completion in engine.generate(good)]
    bad = Request(prompt, {"r8": 1.0}, params)
    first, failed, second, again = engine.generate([good[0], bad, good[1], bad])
    assert [first.token_ids, second.token_ids] == alone
    for completion in (failed, again):
        assert isinstance(completion.error, InternalError)
        assert "output token 0 are not finite" in completion.error.message
        assert "the adapter's weights" in completion.error.message
        assert completion.token_ids == ()
    engine.check_integrity()
    engine.close()


def test_a_base_model_that_overflows_is_named(tiny, tmp_path):
    make_tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
    save_file(tensors, path, metadata={"format": "pt"})
    engine = Engine(EngineConfig(str(tmp_path), device="cpu"))
    (completion,) = engine.generate([Request([5, 6, 7])])
    assert "not finite; the base model's weights overflow in float32" in completion.error.message
    engine.close()
