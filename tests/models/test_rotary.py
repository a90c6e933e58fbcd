"""Rotary frequencies and attention factors against transformers' own, for every kind of scaling."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from openlora.models.rotary import inverse_frequencies, read_scaling, rope_kind

HEAD_DIM = 64
MAX_LEN = 4096
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 50 for i in range(32)],
    "long_factor": [1 + i for i in range(32)],
    "original_max_position_embeddings": 1024,
}
CASES = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, shrunk": YARN | {"factor": 0.5},
    "yarn, bounds": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn, factor given": YARN | {"attention_factor": 0.8},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, original unknown": {"rope_type": "yarn", "factor": 4.0},
    "longrope": LONGROPE,
    "longrope, factors given": LONGROPE | {"factor": 8.0, "attention_factor": 1.3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_frequencies_and_factor(name, theta):
    fields = CASES[name] | {"rope_theta": theta}
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=MAX_LEN,
        rope_parameters=dict(fields),
    )
    want, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, seq_len=MAX_LEN)
    scaling = read_scaling(fields, MAX_LEN, None)
    got = inverse_frequencies(HEAD_DIM, theta, scaling, MAX_LEN)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert (scaling.attention_factor if scaling else 1.0) == pytest.approx(factor)


def test_longrope_has_frequencies_for_short_contexts():
    fields = LONGROPE | {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    config = Phi3Config(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=MAX_LEN,
        original_max_position_embeddings=1024,
        rope_parameters=dict(fields),
    )
    want, factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=1024)
    scaling = read_scaling(fields, MAX_LEN, 1024)
    torch.testing.assert_close(inverse_frequencies(HEAD_DIM, 10000.0, scaling, 1024), want)
    assert scaling.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "default"),
        ({"type": "linear", "factor": 2.0}, "linear"),
        ({"type": "su", "short_factor": [1.0]}, "longrope"),
        ({"type": "yarn", "short_factor": [1.0]}, "longrope"),
        ({"rope_type": "yarn"}, "yarn"),
    ],
)
def test_names_of_the_past(fields, kind):
    assert rope_kind(fields) == kind
