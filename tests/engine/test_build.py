"""Parts from settings: limits are worked out and refused with their numbers."""

from __future__ import annotations

import pytest
import torch

from openlora.engine import Engine, EngineConfig, build
from openlora.engine.adapter_fit import MOST_OVER
from openlora.engine.adapter_supply import MAX_STAGED
from openlora.engine.build import build_parts, choose_device
from openlora.errors import AdapterFailed, OpenLoRAError, SetupError
from tests.engine.tiny_model import make_tiny_model
from tests.models.tiny_families import FAMILIES, SHORT_LONGROPE, WINDOW


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(directory)
    return str(directory)


def test_auto_takes_what_is_there_and_cuda_must_be():
    has_cuda = torch.cuda.is_available()
    assert choose_device("auto") == ("cuda" if has_cuda else "cpu")
    assert choose_device("cpu") == "cpu"
    if not has_cuda:
        with pytest.raises(SetupError, match="no CUDA device"):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("settings", "max_model_len"),
    [
        ({}, 256),
        ({"max_model_len": 100}, 100),
        ({"num_kv_blocks": 3}, 48),
        ({"kv_cache_bytes": 2 * 2 * 2 * 16 * 16 * 4 * 5}, 80),
    ],
)
def test_the_context_is_the_least_of_model_cache_and_setting(model_dir, settings, max_model_len):
    parts = build_parts(EngineConfig(model_dir, device="cpu", **settings))
    assert parts.model_info.max_model_len == max_model_len
    assert parts.model_info.dtype == "float32"
    assert parts.model_info.eos_token_ids == (2,)


def test_adapters_that_take_turns_have_room_in_host_memory_meanwhile(model_dir, monkeypatch):
    monkeypatch.setattr(build, "_CPU_HOST_BYTES", 0)
    parts = build_parts(EngineConfig(model_dir, device="cpu", adapter_pages=(40,) * 4))
    assert parts.max_staged == int(MOST_OVER * 40)
    monkeypatch.setattr(build, "_CPU_HOST_SHARE", 1 << 60)
    parts = build_parts(EngineConfig(model_dir, device="cpu", adapter_pages=(40,) * 4))
    assert parts.max_staged == MAX_STAGED, "and no more than the machine has"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 300}, "model's own limit is 256"),
        ({"num_kv_blocks": 2, "max_model_len": 100}, "KV cache holds 32 tokens"),
        ({"kv_cache_bytes": 100}, "not one KV block"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(model_dir, settings, words):
    with pytest.raises(SetupError, match=words):
        build_parts(EngineConfig(model_dir, device="cpu", **settings))


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(OpenLoRAError, match="nowhere"):
        build_parts(EngineConfig(str(tmp_path / "nowhere"), device="cpu"))


def test_an_adapter_directory_that_is_not_there_fails_its_request(model_dir, tmp_path):
    engine = Engine(EngineConfig(model_dir, device="cpu"))
    with pytest.raises(AdapterFailed, match="nowhere"):
        engine.load_adapter("a", tmp_path / "nowhere")
    engine.close()


def test_what_the_cache_holds_decides_over_frequencies_and_windows(tmp_path):
    SHORT_LONGROPE.save(tmp_path / "long")
    FAMILIES["mistral"].save(tmp_path / "sliding")

    def model(name, **settings):
        parts = build_parts(
            EngineConfig(str(tmp_path / name), device="cpu", cpu_kernels="torch", **settings)
        )
        return parts.runner._model, parts.model_info.max_model_len

    short, limit = model("long", num_kv_blocks=4)
    long, _ = model("long")
    assert limit == 64
    assert not torch.equal(short.rope_inv_freq, long.rope_inv_freq)
    same, _ = model("long", max_model_len=64)
    assert torch.equal(short.rope_inv_freq, same.rope_inv_freq)
    assert model("sliding")[0].config.sliding_window == WINDOW
    assert model("sliding", num_kv_blocks=1, block_size=WINDOW)[0].config.sliding_window == 0
