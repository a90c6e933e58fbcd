# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""Dense linears in Triton whose rows do not depend on each other, nor on how many there are.

cuBLAS picks tiles, and with them the order of its sums, by the number of rows. Here an output is
always Σ over ``SPLITS`` fixed ranges of K, added in their order, each range summed in steps of one
size by one kind of tensor core instruction. ``SPLITS`` and the steps follow from the weight's shape
and dtype alone. What does depend on the rows is who computes: with few of them every range has a
program of its own, so that all processors pull bytes, and the last one adds up; with many one
program goes through all ranges. A tile of few rows is one warp group's, a tile of many two warp
groups', side by side, with the same instructions (tests/kernels/test_compile.py looks at them).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openlora.kernels.linear import Linear
from openlora.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch_options,
    overlaps_launches,
)

_BLOCK_N = 128
_SMALL_ROWS = 64
"""Rows of a tile where there are no more of them in all; others have twice as many."""
_SPLIT_ROWS = 256
"""Most rows for which the ranges of K are summed side by side."""
_WANTED_PROGRAMS = 128
_MIN_SPLIT = 256
_MAX_SPLITS = 8
_GROUP_M = 8
"""Tiles of rows that pass over the weight together, out of the L2 cache."""


@triton.jit
def _store_tile(
    total,
    out_ptr,
    bias_ptr,
    rows,
    columns,
    num_rows,
    out_stride,
    N: tl.constexpr,
    BIAS: tl.constexpr,
):
    in_columns = columns < N
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0)
        total += bias.to(tl.float32)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    in_tile = (rows < num_rows)[:, None] & in_columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def _range_sum(
    x_at,
    weight_at,
    in_rows,
    split,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile's sum over one range of K: the same instructions in the same order everywhere."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(split * SPLIT, min(split * SPLIT + SPLIT, K), BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_at + k, mask=in_rows, other=0.0)
            weight = tl.load(weight_at + k)
        else:
            in_k = (k + tl.arange(0, BLOCK_K) < K)[None, :]
            x = tl.load(x_at + k, mask=in_rows & in_k, other=0.0)
            weight = tl.load(weight_at + k, mask=in_k, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _invariant_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrived_ptr,
    num_rows,
    x_stride,
    out_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    SPLIT: tl.constexpr = ((K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)) * BLOCK_K
    TILE: tl.constexpr = BLOCK_M * BLOCK_N
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    group = tl.program_id(0) // (GROUP_M * TILES_N)
    in_group = tl.program_id(0) % (GROUP_M * TILES_N)
    group_rows = min(tl.cdiv(num_rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + in_group % group_rows
    tile_n = in_group // group_rows
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Columns behind the last are computed from the first one's weights, and not stored.
    weight_rows = tl.where(columns < N, columns, 0).to(tl.int64)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + ks[None, :]
    weight_at = weight_ptr + weight_rows[:, None] * K + ks[None, :]
    in_rows = (rows < num_rows)[:, None]
    if not APART:
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for split in range(SPLITS):
            total += _range_sum(
                x_at, weight_at, in_rows, split, K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K
            )
        _store_tile(total, out_ptr, bias_ptr, rows, columns, num_rows, out_stride, N, BIAS)
    else:
        split = tl.program_id(1)
        share = _range_sum(x_at, weight_at, in_rows, split, K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K)
        places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tile = (tile_m * TILES_N + tile_n).to(tl.int64)
        partial_at = partial_ptr + tile * (SPLITS * TILE) + places
        tl.store(partial_at + split * TILE, share, mask=in_rows)
        # Whoever arrives last adds up, always in the order of the ranges.
        tl.debug_barrier()
        count_at = arrived_ptr + tile
        arrived = tl.atomic_add(count_at, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            tl.debug_barrier()
            total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for other in range(SPLITS):
                total += tl.load(
                    partial_at + other * TILE, mask=in_rows, other=0.0, cache_modifier=".cg"
                )
            _store_tile(total, out_ptr, bias_ptr, rows, columns, num_rows, out_stride, N, BIAS)
            tl.store(count_at, 0)


class SplitScratch:
    """Partial sums of one launch at a time, for all linears of a model.

    Args:
        device: of the linears.
    """

    def __init__(self, device: torch.device) -> None:
        self.partial = torch.empty(1, device=device)
        # Counts back to zero at the end of every launch.
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def reserve(self, num_tiles: int, num_elements: int) -> None:
        """Hold so many; before the first launch, for launches keep what they found."""
        device = self.partial.device
        if num_elements > self.partial.numel():
            self.partial = torch.empty(num_elements, device=device)
        if num_tiles > self.arrived.numel():
            self.arrived = torch.zeros(num_tiles, dtype=torch.int32, device=device)


class InvariantLinear(Linear):
    """y = x Wᵀ + b, each row bit for bit the same whatever the others are; see the module.

    Sums are fp32, the bias is added before they are rounded.

    Args:
        scratch: shared with linears that never run at the same time.
        weight: [out_features, in_features]; copied where it is not contiguous.
        bias: [out_features], same dtype; None: there is none.
        splits: ranges that K is summed in; None: ``num_splits``.
    """

    __slots__ = ("_scratch", "_splits")

    def __init__(
        self,
        scratch: SplitScratch,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        splits: int | None = None,
    ) -> None:
        self.weight, self.bias = weight.contiguous(), bias
        self.out_features, self.in_features = weight.shape
        self.is_packed = False
        self._scratch = scratch
        self._splits = splits or num_splits(self.out_features, self.in_features)
        if self._splits > 1:
            tiles = (_SPLIT_ROWS // _SMALL_ROWS) * triton.cdiv(self.out_features, _BLOCK_N)
            scratch.reserve(tiles, tiles * self._splits * _SMALL_ROWS * _BLOCK_N)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As a call, bit for bit, into ``out`` [rows, out_features], last dimension contiguous."""
        num_rows = x.shape[0]
        if not num_rows:
            return out
        is_small = num_rows <= _SMALL_ROWS
        is_wide = x.dtype == torch.float32
        block_m = _SMALL_ROWS if is_small else 2 * _SMALL_ROWS
        tiles = triton.cdiv(num_rows, block_m) * triton.cdiv(self.out_features, _BLOCK_N)
        overlap = overlaps_launches()
        apart = self._splits > 1 and num_rows <= _SPLIT_ROWS
        _invariant_linear_kernel[(tiles, self._splits if apart else 1)](
            x,
            self.weight,
            x if self.bias is None else self.bias,
            out,
            self._scratch.partial,
            self._scratch.arrived,
            num_rows,
            x.stride(0),
            out.stride(0),
            N=self.out_features,
            K=self.in_features,
            BIAS=self.bias is not None,
            SPLITS=self._splits,
            APART=apart,
            BLOCK_M=block_m,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=32 if is_wide else 64,
            GROUP_M=_GROUP_M,
            OVERLAP=overlap,
            num_warps=4 if is_small else 8,
            num_stages=2 if is_wide else 4,
            **launch_options(overlap),
        )
        return out

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features] of the weight's dtype, last dimension contiguous; a new tensor."""
        return self.into(x, x.new_empty(x.shape[0], self.out_features))


def num_splits(out_features: int, in_features: int) -> int:
    """Ranges of K that a weight of this shape is summed in: enough programs, none too short."""
    splits = 1
    while (
        triton.cdiv(out_features, _BLOCK_N) * splits < _WANTED_PROGRAMS
        and splits < _MAX_SPLITS
        and in_features >= 2 * splits * _MIN_SPLIT
    ):
        splits *= 2
    return splits
