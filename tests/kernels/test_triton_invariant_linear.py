"""The batch-invariant linears: against fp32, and each row bit for bit as it is alone."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels.triton_invariant_linear import InvariantLinear, SplitScratch, num_splits
from tests.kernels.test_triton_sgmv import DEVICE, HALF

# (out, in): summed in one range and in several, sizes of tiles and sizes of nothing.
SHAPES = {(128, 64): 1, (72, 200): 1, (256, 1024): 4, (161, 1100): 4}
TOLERANCE = {torch.float32: 1e-5, HALF: 1e-2}
BATCHES = (1, 2, 17, 64, 65, 257)
"""Either side of the sizes at which the launches change."""


def make_case(
    shape: tuple[int, int], dtype: torch.dtype, *, bias: bool
) -> tuple[InvariantLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    added = torch.randn(shape[0], generator=generator).to(DEVICE, dtype) if bias else None
    x = torch.randn(300, shape[1], generator=generator).to(DEVICE, dtype)
    return InvariantLinear(SplitScratch(DEVICE), weight, added), x


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_right_and_the_same_in_any_batch(shape, dtype) -> None:
    linear, x = make_case(shape, dtype, bias=shape[0] % 2 == 0)
    assert num_splits(*shape) == SHAPES[shape]
    whole = linear(x)
    expected = x.float() @ linear.weight.float().t()
    if linear.bias is not None:
        expected += linear.bias.float()
    error = (whole.float() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]
    for rows in BATCHES:
        # In other places of their tiles, beside others.
        others = rows - 1
        moved = linear(torch.cat((x[300 - others :], x[:1])))
        assert torch.equal(moved[others], whole[0])
        assert torch.equal(moved[:others], whole[300 - others :])


def test_repeats_find_their_counters_at_zero() -> None:
    linear, x = make_case((256, 1024), torch.float32, bias=False)
    first = linear(x[:5])
    assert torch.equal(linear(x[:5]), first)
    assert not linear._scratch.arrived.any()


def test_into_a_part_of_a_larger_tensor() -> None:
    linear, x = make_case((161, 1100), torch.float32, bias=True)
    out = torch.full((9, 161), float("nan"), device=DEVICE)
    assert linear.into(x[:4], out[:4]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:4], linear(x[:4]))
    assert out[4:].isnan().all()


def test_no_rows() -> None:
    linear, x = make_case((128, 64), torch.float32, bias=False)
    assert linear(x[:0]).shape == (0, 128)


def test_linears_share_scratch_of_the_largest() -> None:
    scratch = SplitScratch(DEVICE)
    small, large = (
        InvariantLinear(scratch, torch.ones(shape, device=DEVICE))
        for shape in ((128, 1024), (640, 1024))
    )
    x = torch.ones(256, 1024, device=DEVICE)
    assert torch.equal(small(x), torch.full((256, 128), 1024.0, device=DEVICE))
    assert torch.equal(large(x), torch.full((256, 640), 1024.0, device=DEVICE))


@pytest.mark.parametrize(
    ("shape", "splits"),
    [((6144, 4096), 4), ((4096, 4096), 4), ((28672, 4096), 1), ((4096, 14336), 4)],
)
def test_ranges_of_an_8b_model_fill_the_processors(shape, splits) -> None:
    assert num_splits(*shape) == splits
