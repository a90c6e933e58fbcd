"""The native kernels for tests, and steps made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from openlora.kernels.native.build import NativeUnavailable
from openlora.kernels.native.library import (
    Arena,
    Kind,
    NativeKernels,
    Step,
    make_op,
    native_kernels,
)
from openlora.kernels.native.plan import Run, plan_site

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def kernels_or_skip() -> NativeKernels:
    """The compiled kernels; skips where this machine has no C compiler."""
    try:
        return native_kernels()
    except NativeUnavailable as unavailable:
        pytest.skip(f"no native kernels: {unavailable}")


def close(actual, expected, dtype=torch.float32):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def run(kind: Kind, dtype, tensors, numbers, factors=(), step: Step | None = None, rows=0):
    """One operation, now."""
    step = step or Step(rows=rows)
    kernels_or_skip().run(make_op(kind, dtype, tensors, numbers, factors), step)


def lora_linear(x, weight, bias, a, b, block_slices: Sequence[int], runs: Sequence[Run]):
    """y = x Wᵀ + bias + SGMV, as the engine runs it. a, b: one layer's pages, see ``sgmv``."""
    kernels = kernels_or_skip()
    rows, columns = x.shape[0], weight.shape[0]
    packed = kernels.pack(weight, Arena())
    y = torch.full((rows, columns), 7.0, dtype=x.dtype)
    sums = y if x.dtype is torch.float32 else torch.empty(rows, columns)
    plan = plan_site(runs, a.shape[2])
    step = Step(rows=rows)
    if plan is not None:
        step.sites[2] = plan.site
    tensors = (x, packed, bias, y, b, torch.tensor(block_slices), a, sums)
    numbers = (x.shape[1], columns, 2, b.stride(0), b.shape[3], a.shape[2] // 16, a.stride(0))
    for kind in (Kind.SHRINK, Kind.LINEAR, Kind.EXPAND):
        kernels.run(make_op(kind, x.dtype, tensors, (*numbers, b.shape[1])), step)
    return y
