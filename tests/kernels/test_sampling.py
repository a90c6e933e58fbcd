"""Sampling against plain definitions, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openlora.kernels import sampling
from openlora.kernels.sampling import SamplingInputs, greedy, gumbel_noise, sample

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def make_inputs(rows, *, penalties=(), logprob_rows=(), num_top=0) -> SamplingInputs:
    """Rows are dicts of temperature, top_k, top_p, min_p, seed, index; all of them are drawn."""

    def column(name, default, dtype):
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype)

    pairs = list(zip(*penalties, strict=True)) or [[], [], [], []]
    return SamplingInputs(
        drawn_rows=torch.arange(len(rows)),
        temperature=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int64),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        seed=column("seed", 0, torch.int64),
        output_index=column("index", 0, torch.int64),
        is_filtered=any(row.keys() & {"top_k", "top_p", "min_p"} for row in rows),
        penalty_rows=torch.tensor(pairs[0], dtype=torch.int64),
        penalty_tokens=torch.tensor(pairs[1], dtype=torch.int64),
        penalty_factor=torch.tensor(pairs[2], dtype=torch.float32),
        penalty_offset=torch.tensor(pairs[3], dtype=torch.float32),
        logprob_rows=torch.tensor(logprob_rows, dtype=torch.int64),
        num_top=num_top,
    )


def draws(logits, count, **row):
    """``count`` draws from one row of logits, at output indices 0, 1, …"""
    inputs = make_inputs([{**row, "index": index} for index in range(count)])
    return sample(logits.expand(count, -1), inputs).token_ids


def mix(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def noise_by_definition(seed: int, index: int, token: int) -> float:
    key = mix((seed + mix((index + GOLDEN) & MASK)) & MASK)
    bits = mix((key + token * GOLDEN) & MASK)
    uniform = min(max((bits >> 11) * 2.0**-53, 2.0**-54), 1 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


@given(seed=st.integers(0, (1 << 63) - 1), index=st.integers(0, 1 << 20), token=st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_noise_is_what_the_formulas_say(seed, index, token):
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([index]), token + 1)[0, -1]
    assert float(noise) == pytest.approx(
        noise_by_definition(seed, index, token), rel=1e-5, abs=1e-5
    )


def test_noise_does_not_depend_on_the_rows_beside_it():
    seeds, indices = torch.arange(7) * 991, torch.arange(7)
    together = gumbel_noise(seeds, indices, 1000)
    for i in range(7):
        alone = gumbel_noise(seeds[i : i + 1], indices[i : i + 1], 1000)[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-6, atol=1e-6)


def test_noise_has_the_moments_of_gumbel_and_no_correlation_between_neighbours():
    noise = gumbel_noise(torch.arange(16), torch.zeros(16, dtype=torch.int64), 1 << 16).double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.005)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.01)
    assert noise.isfinite().all()
    centred = noise - noise.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs(float((centred * other).mean())) < 0.01


def test_greedy_takes_the_largest_and_the_smallest_id_on_ties():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -1.0, 0.5, 9.0]])
    assert greedy(logits).tolist() == [1, 0, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad):
    logits = torch.zeros(4, 50)
    logits[1, 30] = bad
    logits[3] = -math.inf
    assert greedy(logits).tolist() == [0, -1, 0, -1]
    inputs = make_inputs([{"top_p": 0.9}, {"top_p": 0.9}, {}, {}], logprob_rows=[0, 1], num_top=1)
    token_ids = sample(logits, inputs).token_ids.tolist()
    assert [token < 0 for token in token_ids] == [False, True, False, True]


def test_masked_logits_are_never_drawn():
    logits = torch.full((1, 64), -math.inf)
    logits[0, [3, 40]] = 0.0
    assert set(draws(logits, 200).tolist()) == {3, 40}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -6.0]])
    count = 40_000
    counts = draws(logits, count, temperature=temperature, seed=3).bincount(minlength=5)
    expected = (logits[0] / temperature).softmax(-1)
    error = (expected * (1 - expected) / count).sqrt()
    assert ((counts / count - expected).abs() < 5 * error + 1e-9).all()


def test_a_tiny_temperature_is_greedy_without_overflow():
    logits = torch.tensor([[1e4, 2e4, 1.9999e4]])
    assert draws(logits, 50, temperature=1e-30).unique().tolist() == [1]


def kept_by_definition(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[:top_k] if top_k else order
    weights = [math.exp(logits[i] - logits[order[0]]) for i in kept]
    total, mass, nucleus = sum(weights), 0.0, []
    for token, weight in zip(kept, weights, strict=True):
        if mass < top_p * total or not nucleus:
            nucleus.append(token)
        mass += weight
    return {i for i in nucleus if math.exp(logits[i] - logits[order[0]]) >= min_p}


@given(
    order=st.permutations(range(12)),
    gap=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1.0, 0.91, 0.4, 0.01]),
    min_p=st.sampled_from([0.0, 0.043, 1.0]),
    sizes=st.sampled_from([(2, 5), (1024,)]),
    fixed_order=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_filters_keep_what_their_definitions_keep(
    order, gap, top_k, top_p, min_p, sizes, fixed_order
):
    logits = torch.tensor([[gap * place for place in order]])
    row = {"top_k": min(top_k, 12), "top_p": top_p, "min_p": min_p}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_NUCLEUS_SIZES", sizes)
        scaled = logits - logits.amax()
        threshold = sampling._threshold(scaled, make_inputs([row]), fixed_order)
    kept = set((scaled[0] >= threshold).nonzero().flatten().tolist())
    assert kept == kept_by_definition(logits[0].tolist(), top_k, top_p, min_p)


def test_rows_are_filtered_each_by_its_own_settings():
    logits = torch.linspace(0, 3, 30).repeat(4, 1)
    rows = [{"top_k": 1}, {"top_p": 0.2}, {"min_p": 0.9}, {"top_k": 29, "top_p": 0.999}]
    inputs = make_inputs(rows)
    scaled = logits - logits.amax(-1, keepdim=True)
    together = sampling._threshold(scaled, inputs, fixed_order=False)
    for i, row in enumerate(rows):
        alone = sampling._threshold(scaled[i : i + 1], make_inputs([row]), fixed_order=False)
        assert float(together[i]) == pytest.approx(float(alone[0]))


def test_penalties_change_the_named_tokens_alone():
    logits = torch.tensor([[4.0, 3.9, -1.0, 0.0], [4.0, 3.9, -1.0, 0.0]])
    inputs = make_inputs(
        [{"top_k": 1}, {"top_k": 1}], penalties=[(0, 0, 2.0, 0.0), (0, 2, 2.0, 0.5)]
    )
    assert sample(logits, inputs).token_ids.tolist() == [1, 0]
    penalised = sampling._penalise(logits, inputs)
    assert penalised[0].tolist() == pytest.approx([2.0, 3.9, -2.5, 0.0])
    assert penalised[1].tolist() == logits[1].tolist()
    assert logits[0, 0] == 4.0, "the caller's logits stay as they are"


def test_logprobs_are_of_the_raw_distribution():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    inputs = make_inputs(
        [{"temperature": 0.3, "top_k": 2}, {}, {}],
        penalties=[(0, 5, 1.0, 2.0)],
        logprob_rows=[0, 2],
        num_top=3,
    )
    samples = sample(logits, inputs)
    expected = logits.log_softmax(-1)
    for line, row in enumerate([0, 2]):
        token = int(samples.token_ids[row])
        assert float(samples.logprobs[line]) == pytest.approx(float(expected[row, token]), abs=1e-6)
        assert samples.top_ids[line].tolist() == expected[row].topk(3).indices.tolist()
        assert samples.top_logprobs[line].tolist() == pytest.approx(
            expected[row].topk(3).values.tolist(), abs=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_float_dtype_is_taken(dtype):
    logits = torch.tensor([[0.0, 8.0, 1.0]], dtype=dtype)
    assert draws(logits, 3, temperature=0.1).tolist() == [1, 1, 1]


def mixed_rows(vocab: int) -> tuple[torch.Tensor, list[dict]]:
    """Rows of every kind, flat ones and ones with ties as half precision makes them."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(9, vocab, generator=generator) * torch.tensor([[0.01], [1], [4]] * 3).view(
        9, 1
    )
    kinds = [{}, {"top_p": 0.9}, {"top_p": 0.5, "top_k": 40}, {"min_p": 0.05, "temperature": 0.7}]
    rows = [{**kinds[index % 4], "seed": index, "index": index} for index in range(9)]
    return logits.bfloat16().float(), rows


@pytest.mark.parametrize("vocab", [300, 1000, 9001])
def test_in_fixed_order_rows_are_the_same_alone_and_together(vocab: int) -> None:
    logits, rows = mixed_rows(vocab)
    every = sample(logits, make_inputs(rows, logprob_rows=range(9), num_top=5), fixed_order=True)
    for index, row in enumerate(rows):
        alone = sample(
            logits[index : index + 1],
            make_inputs([row], logprob_rows=[0], num_top=5),
            fixed_order=True,
        )
        assert alone.token_ids[0] == every.token_ids[index]
        assert torch.equal(alone.logprobs[0], every.logprobs[index])
        assert torch.equal(alone.top_ids[0], every.top_ids[index])
        assert torch.equal(alone.top_logprobs[0], every.top_logprobs[index])


def test_in_fixed_order_the_draws_are_those_of_any_order() -> None:
    logits, rows = mixed_rows(1000)
    inputs = make_inputs(rows, logprob_rows=range(9), num_top=5)
    usual, fixed = sample(logits, inputs), sample(logits, inputs, fixed_order=True)
    assert torch.equal(usual.token_ids, fixed.token_ids)
    torch.testing.assert_close(usual.logprobs, fixed.logprobs)
    torch.testing.assert_close(usual.top_logprobs, fixed.top_logprobs)
    # Ties are many here: the smallest IDs of them come first.
    for row, ids in zip(logits, fixed.top_ids, strict=True):
        assert ids.tolist() == sorted(range(1000), key=lambda at: (-row[at].item(), at))[:5]


def test_sums_in_front_do_not_depend_on_what_is_behind() -> None:
    x = torch.rand(3, 700, generator=torch.Generator().manual_seed(2))
    sums = sampling._tree_cumsum(x)
    torch.testing.assert_close(sums, x.cumsum(-1))
    assert (sums.diff() >= 0).all()
    for width in (1, 2, 256, 257):
        assert torch.equal(sampling._tree_cumsum(x[:1, :width]), sums[:1, :width])
    torch.testing.assert_close(sampling._tree_sum(x), x.sum(-1))
