"""Decoder logits against transformers on tiny random models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from openlora.adapters.lora_set import LoRASet
from openlora.adapters.page_tensors import PageTensors
from openlora.engine.kv_cache import KVCache
from openlora.engine.runner import ModelRunner
from openlora.engine.step import StepRow
from openlora.models.load import load_model

CASES = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    "all heads, tied": {"num_attention_heads": 4, "tie_word_embeddings": True},
    "one kv head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "llama3 rope": {
        "num_attention_heads": 4,
        "rope_parameters": {
            "rope_theta": 500.0,
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "linear rope": {
        "num_attention_heads": 4,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0},
    },
}


def make(tmp_path, **fields):
    torch.manual_seed(0)
    defaults = {"num_key_value_heads": None, "tie_word_embeddings": False}
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        max_position_embeddings=128,
        initializer_range=0.2,
        **(defaults | fields),
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path)
    return model


@torch.inference_mode()
def all_logits(directory, token_ids, chunk, dtype="float32"):
    """Logits of every position, the prompt fed in chunks of ``chunk`` tokens."""
    model = load_model(str(directory), dtype=dtype)
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [64, 17, 1])
def test_logits_equal_those_of_transformers(tmp_path, case, chunk):
    reference = make(tmp_path, **CASES[case])
    token_ids = torch.randint(0, 96, (50,)).tolist()
    with torch.inference_mode():
        want = reference(torch.tensor([token_ids])).logits[0]
    got = all_logits(tmp_path, token_ids, chunk)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_fp32(tmp_path, dtype):
    reference = make(tmp_path, **CASES["grouped"])
    token_ids = torch.randint(0, 96, (20,)).tolist()
    with torch.inference_mode():
        want = reference(torch.tensor([token_ids])).logits[0]
        half = reference.to(getattr(torch, dtype))
        theirs = (half(torch.tensor([token_ids])).logits[0].float() - want).abs().mean()
    ours = (all_logits(tmp_path, token_ids, 7, dtype) - want).abs().mean()
    # As close to fp32 as transformers in the same dtype, with room for another rounding order.
    assert ours < 2 * theirs
