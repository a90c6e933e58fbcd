"""Native linears and SGMV against plain products, on ragged sizes and ranks."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels.native.library import Arena
from openlora.kernels.native.linear import NativeLinear
from openlora.kernels.sgmv import Segment
from tests.kernels.native import TOLERANCE, close, kernels_or_skip, lora_linear
from tests.kernels.test_sgmv import SITES, expected, make_pages

pytestmark = pytest.mark.usefixtures("two_threads")

ROWS = [0, 1, 2, 7, 8, 9, 12, 13, 16, 17, 32, 33, 70]
DTYPES = list(TOLERANCE)


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def make_linear(weight, bias=None):
    return NativeLinear(kernels_or_skip(), Arena(), weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inputs"), [(40, 24), (1, 1), (33, 45), (64, 576), (97, 31)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(out, inputs, dtype, has_bias):
    weight = (random(out, inputs) / inputs**0.5).to(dtype)
    bias = random(out, dtype=dtype, seed=1) if has_bias else None
    linear = make_linear(weight, bias)
    assert (linear.out_features, linear.in_features) == (out, inputs)
    for rows in ROWS:
        x = random(rows, inputs, dtype=dtype, seed=rows)
        want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        got = linear(x)
        assert got.dtype is dtype
        close(got, want, dtype)
        assert torch.equal(linear(x), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other_row(dtype):
    linear = make_linear(random(70, 45, dtype=dtype))
    x = random(70, 45, dtype=dtype, seed=1)
    whole = linear(x)
    for rows in ROWS[1:]:
        assert torch.equal(linear(x[-rows:]), whole[-rows:])


def test_large_weights_take_slabs_of_their_own():
    arena = Arena()
    taken = [arena.take(size) for size in (100, 5000, 70 << 20, 3)]
    assert [len(part) for part in taken] == [100, 5000, 70 << 20, 3]
    starts = [part.data_ptr() for part in taken]
    assert len(set(starts)) == 4
    assert all(start % 4096 == 0 for start in starts)
    for part, value in zip(taken, (1, 2, 3, 4), strict=True):
        part[:] = value
    assert [int(part[-1]) for part in taken] == [1, 2, 3, 4]


RAGGED = [
    ((1,), (((0, 1.0),),)),
    ((3,), ((),)),
    ((1, 1, 1, 5), (((0, 1.0),), ((1, 1.0),), (), ((2, 1.0),))),
    ((2, 9, 4), (((0, 0.5), (3, -1.5)), ((1, 1.0),), ((4, 1.0), (2, 2.0), (5, 0.25)))),
    ((17, 16, 7), (((0, 1.0),), (), ((1, 1.0), (2, 1.0)))),
    ((33, 20), (((5, 1.0),), ((4, 0.7), (3, 0.3)))),
    # Rank 128: eight pages.
    ((1, 40), (tuple((page, 1.0) for page in range(8)), tuple((p, 0.5) for p in (1, 0)))),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("lens", "pages_of"), RAGGED)
def test_lora_linear(site, lens, pages_of, dtype):
    a, b = make_pages(site, 8, dtype)
    block_slices = SITES[site][2]
    columns = b.shape[1] * b.shape[3]
    rows = sum(lens)
    x = random(rows, a.shape[1], dtype=dtype, seed=2)
    weight = (random(columns, a.shape[1]) / a.shape[1] ** 0.5).to(dtype)
    bias = random(columns, seed=3)
    runs, segments, start = [], [], 0
    for length, pages in zip(lens, pages_of, strict=True):
        runs.append((start, start + length, pages))
        if pages:
            segments.append(Segment(start, start + length, pages))
        start += length
    got = lora_linear(x, weight, bias, a, b, block_slices, runs)
    base = x.float() @ weight.float().T + bias
    want = expected(base, x, a, b, segments, block_slices)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "block_out"), [(24, 40), (45, 64), (64, 96)])
def test_few_rows_and_many_give_a_row_the_same_bits(inputs, block_out, dtype):
    a = (random(4, inputs, 16) * 0.2).to(dtype)
    b = (random(4, 2, 16, block_out) * 0.2).to(dtype)
    weight, x = random(2 * block_out, inputs, dtype=dtype), random(40, inputs, dtype=dtype, seed=1)
    pages = ((2, 1.0), (0, 0.5))
    many = lora_linear(x, weight, None, a, b, (0, 0), [(0, 40, pages)])
    for row in (0, 7, 39):
        alone = lora_linear(x[row : row + 1], weight, None, a, b, (0, 0), [(0, 1, pages)])
        assert torch.equal(alone[0], many[row])
    mixed = [(0, 3, ()), (3, 11, pages), (11, 12, ((1, 1.0),))]
    few = lora_linear(x[:12], weight, None, a, b, (0, 0), mixed)
    assert torch.equal(few[3:11], many[3:11])
