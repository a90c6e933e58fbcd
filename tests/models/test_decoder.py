"""Decoder logits against transformers on tiny random models of every family."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from openlora.adapters.lora_set import LoRASet
from openlora.adapters.page_tensors import PageTensors
from openlora.engine.kv_cache import KVCache
from openlora.engine.runner import ModelRunner
from openlora.engine.step import StepRow
from openlora.models.load import load_model
from tests.models.tiny_families import FAMILIES, SHORT_LONGROPE, VOCAB_SIZE


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name → (directory, transformers' model), each made once."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("model")
            made[name] = directory, FAMILIES[name].save(directory)
        return made[name]

    return get


def prompt(length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.inference_mode()
def all_logits(model, token_ids, chunk):
    """Logits of every position, the prompt fed in chunks of ``chunk`` tokens."""
    cache = KVCache(model.config, 12, model.dtype, model.device, block_size=16)
    runner = ModelRunner(model, PageTensors(model.config, (0,) * 4, model.dtype, "cpu"), cache)
    table = [7, 2, 9, 4, 11]
    parts = []
    for start in range(0, len(token_ids), chunk):
        part = token_ids[start : start + chunk]
        row = StepRow(0, part, start, table, LoRASet.EMPTY, None)
        ops = runner._bind([row])
        parts.append(model.logits(model.forward(torch.tensor(part), ops), ops))
    return torch.cat(parts).float()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [64, 17, 1])
def test_logits_equal_those_of_transformers(saved, name, chunk):
    directory, reference = saved(name)
    token_ids = prompt(50)
    with torch.inference_mode():
        want = reference(torch.tensor([token_ids])).logits[0]
    got = all_logits(load_model(str(directory)), token_ids, chunk)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_fp32(saved, name, dtype):
    directory, reference = saved(name)
    token_ids = prompt(20)
    with torch.inference_mode():
        want = reference(torch.tensor([token_ids])).logits[0]
        half = deepcopy(reference).to(getattr(torch, dtype))
        theirs = (half(torch.tensor([token_ids])).logits[0].float() - want).abs().mean()
    ours = (all_logits(load_model(str(directory), dtype=dtype), token_ids, 7) - want).abs().mean()
    # As close to fp32 as transformers in the same dtype, with room for another rounding order.
    assert ours < 2 * theirs


def test_longrope_takes_its_short_factors_where_the_limit_allows(tmp_path):
    reference = SHORT_LONGROPE.save(tmp_path)
    token_ids = prompt(50)
    with torch.inference_mode():
        want = reference(torch.tensor([token_ids])).logits[0]
    short = load_model(str(tmp_path), configure=lambda config: config.limited_to(64))
    torch.testing.assert_close(all_logits(short, token_ids, 17), want, atol=2e-4, rtol=2e-4)
    long = load_model(str(tmp_path))
    assert not torch.allclose(all_logits(long, token_ids, 17), want, atol=1e-2)
    long.limit_context(64)
    torch.testing.assert_close(all_logits(long, token_ids, 17), want, atol=2e-4, rtol=2e-4)
