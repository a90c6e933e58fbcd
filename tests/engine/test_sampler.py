"""From rows to tensors and back."""

from __future__ import annotations

import math

import pytest
import torch

from openlora.engine.sampler import sample_rows, sampling_inputs
from openlora.engine.step import RowSampling
from openlora.sampling_params import SamplingParams


def row(*, seed=1, index=0, prompt=(), output=(), **params) -> RowSampling:
    return RowSampling(SamplingParams(**params), seed, index, prompt, output)


LOGITS = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
MIXED = [
    row(temperature=0),
    row(seed=5, logprobs=2),
    row(seed=(1 << 63) - 1, top_p=0.8, index=7),
    row(temperature=0, logprobs=3, repetition_penalty=1.3, prompt=(1, 2), output=(2, 3)),
    row(temperature=0.5, top_k=3, frequency_penalty=-1.5, prompt=(9,), output=(4, 4)),
    row(min_p=0.2, presence_penalty=1.0, output=(7,)),
]


def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone():
    together = sample_rows(LOGITS, MIXED)
    backwards = sample_rows(LOGITS.flip(0), MIXED[::-1])[::-1]
    for i, token in enumerate(together):
        (alone,) = sample_rows(LOGITS[i : i + 1], [MIXED[i]])
        assert token.token_id == alone.token_id == backwards[i].token_id
        assert token.logprob == (pytest.approx(alone.logprob) if alone.logprob else None)
        assert [t for t, _ in token.top_logprobs] == [t for t, _ in alone.top_logprobs]
        assert len(token.top_logprobs) == MIXED[i].params.logprobs


def test_seed_and_index_choose_the_noise():
    tokens = {
        (seed, index): sample_rows(LOGITS[:1], [row(seed=seed, index=index)])[0].token_id
        for seed in range(6)
        for index in range(6)
    }
    assert len(set(tokens.values())) > 8
    assert sample_rows(LOGITS[:1], [row(seed=3, index=4)])[0].token_id == tokens[3, 4]


def test_penalties_follow_their_definitions():
    inputs = sampling_inputs(
        [
            row(repetition_penalty=1.5, prompt=(8, 1), output=(1,)),
            row(presence_penalty=0.5, frequency_penalty=0.25, prompt=(9,), output=(3, 3, 2)),
            row(),
        ],
        torch.zeros(3, 10),
    )
    pairs = zip(
        inputs.penalty_rows.tolist(),
        inputs.penalty_tokens.tolist(),
        inputs.penalty_factor.tolist(),
        inputs.penalty_offset.tolist(),
        strict=True,
    )
    assert list(pairs) == [(0, 1, 1.5, 0), (0, 8, 1.5, 0), (1, 2, 1, 0.75), (1, 3, 1, 1.0)]


def test_a_row_with_nan_has_no_token_and_no_logprob():
    logits = LOGITS.clone()
    logits[1, 5] = math.nan
    tokens = sample_rows(logits, MIXED)
    assert tokens[1].token_id == -1
    assert tokens[1].logprob is None
    assert all(token.token_id >= 0 for i, token in enumerate(tokens) if i != 1)


def test_more_alternatives_than_tokens_are_all_tokens():
    (token,) = sample_rows(torch.zeros(1, 4), [row(logprobs=20)])
    assert sorted(t for t, _ in token.top_logprobs) == [0, 1, 2, 3]


def test_top_k_above_the_vocabulary_keeps_everything():
    (token,) = sample_rows(torch.zeros(1, 4), [row(top_k=1 << 40)])
    assert 0 <= token.token_id < 4
