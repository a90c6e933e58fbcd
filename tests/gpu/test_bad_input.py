"""What an engine on a GPU refuses or fails: by name, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.errors import InternalError, InvalidRequest, PromptTooLong, SetupError
from tests.engine.tiny_model import make_adapters, make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
POOLS = {"num_kv_blocks": 64, "adapter_pages": (8,) * 4, "adapter_host_bytes": 1 << 24}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_tiny_model(root / "model")
    return str(root / "model"), make_adapters(root / "model", root / "adapters")


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_an_adapter_that_overflows_fails_its_own_requests(tiny, tmp_path, temperature) -> None:
    model, adapters = tiny
    path = adapters["r8"] / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_bytes(
        (adapters["r8"] / "adapter_config.json").read_bytes()
    )
    # Each value is finite, their product is not.
    tensors = {name: tensor * 1e30 for name, tensor in load_file(path).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    engine = Engine(EngineConfig(model, device="cuda", dtype="bfloat16", **POOLS))
    engine.load_adapter("r16", adapters["r16"])
    engine.load_adapter("bad", tmp_path)
    params = SamplingParams(max_tokens=5, temperature=temperature, seed=1, ignore_eos=True)
    prompt = torch.arange(3, 40).tolist()
    good = [Request(prompt, {"r16": 1.0}, params), Request(prompt, {}, params)]
    bad = Request(prompt, {"bad": 1.0}, params)
    completions = engine.generate([good[0], bad, good[1], bad])
    assert [len(completions[i].token_ids) for i in (0, 2)] == [5, 5]
    for failed in (completions[1], completions[3]):
        assert isinstance(failed.error, InternalError)
        assert "output token 0 are not finite" in failed.error.message
        assert failed.token_ids == ()
    # What they left in the KV cache and the graphs' buffers is nobody's.
    assert all(len(each.token_ids) == 5 for each in engine.generate(good))
    engine.check_integrity()
    engine.close()


def test_pools_that_do_not_fit_say_what_does_and_which_setting_to_lower(tiny) -> None:
    with pytest.raises(SetupError, match=r"fit.*lower") as raised:
        Engine(EngineConfig(tiny[0], device="cuda", num_kv_blocks=1 << 40))
    assert "num_kv_blocks" in raised.value.message


def test_requests_beyond_the_limits_are_refused_and_others_run(tiny) -> None:
    engine = Engine(EngineConfig(tiny[0], device="cuda", max_model_len=64, **POOLS))
    with pytest.raises(PromptTooLong, match="64"):
        engine.add(Request([5] * 64))
    with pytest.raises(InvalidRequest):
        engine.add(Request([5, 1 << 30]))
    (completion,) = engine.generate([Request([5, 6, 7], {}, SamplingParams(max_tokens=4))])
    assert completion.error is None
    engine.close()
