"""Sums of extras: what is added, scaled, and made once."""

from __future__ import annotations

import torch

from openlora.adapters.extras import AdapterExtras, LinearExtra, TableExtra
from openlora.adapters.extras_combined import MAX_COMBINED, CombinedExtras, combined_extras


def biased(value, *sites):
    bias = torch.full((4,), value)
    return AdapterExtras(linears={site: LinearExtra(None, bias) for site in sites})


def paired(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((6, rank), (rank, 3)))
    return AdapterExtras(embedding=TableExtra(a=a, b=b))


def test_biases_add_up_with_their_weights():
    total = combined_extras([(biased(1.0, (0, 1), (2, 3)), 0.5), (biased(4.0, (0, 1)), -1.0)])
    assert {site: float(extra.bias[0]) for site, extra in total.linears.items()} == {
        (0, 1): 0.5 - 4.0,
        (2, 3): 0.5,
    }


def test_pairs_stand_side_by_side():
    one, two = paired(2, 1), paired(3, 2)
    total = combined_extras([(one, 2.0), (two, -0.5)]).embedding
    wanted = 2.0 * one.embedding.a @ one.embedding.b - 0.5 * two.embedding.a @ two.embedding.b
    torch.testing.assert_close(total.a @ total.b, wanted)
    assert total.a.shape == (6, 5)


def test_one_alone_is_itself_and_a_sum_is_made_once():
    sums, one = CombinedExtras(), biased(1.0, (0, 0))
    assert sums.of("", []) is None
    assert sums.of("one", [(one, 1.0)]) is one
    half = sums.of("half", [(one, 0.5)])
    assert sums.of("half", [(one, 0.5)]) is half
    for number in range(MAX_COMBINED):
        sums.of(str(number), [(one, number + 2.0)])
    assert sums.of("half", [(one, 0.5)]) is not half
