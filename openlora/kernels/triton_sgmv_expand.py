# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""The expand of SGMV in Triton, into a linear's output.

See ``triton_sgmv`` for the shrink, whose result it reads, and for the plan it follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openlora.kernels.triton_launch import (
    gdc_wait,
    launch_options,
    overlaps_launches,
)
from openlora.kernels.triton_sgmv import (
    PAGE_RANK,
    PLAN_HEADER_INTS,
    PLAN_RECORD_INTS,
    SGMVTables,
    SGMVTiles,
)
from openlora.kernels.triton_sgmv_plan import begin_chunks, item_page, plan_chunk, shrunk_rows


@triton.jit
def _expand_kernel(
    h_ptr,
    b_ptr,
    plan_ptr,
    y_ptr,
    items_at,
    max_chunks,
    b_page_stride,
    y_stride,
    h_split_stride,
    HEADER: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED_SPLITS: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_OUT + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = SLICES * RANK
    UNITS: tl.constexpr = BLOCKS * TILES
    items_ptr = plan_ptr + items_at
    work, num_units = begin_chunks(plan_ptr, UNITS, OVERLAP)
    ranks = tl.arange(0, RANK)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    splits = tl.arange(0, SPLITS)
    row_start, num_rows, begin, end, page_0, h_row_0, bits_0 = plan_chunk(
        plan_ptr, work // UNITS, max_chunks, HEADER, RECORD
    )
    while work < num_units:
        block = (work // TILES) % BLOCKS
        n = (work % TILES) * BLOCK_N + columns
        in_block = n < BLOCK_OUT
        # The leading blocks share slice 0 (q's), each of the others has its own.
        part = max(block - (BLOCKS - SLICES), 0)
        h_in = h_ptr + part * RANK
        b_tile = b_ptr + block * (RANK * BLOCK_OUT) + ranks[:, None] * BLOCK_OUT + n[None, :]
        y_start = y_ptr + row_start.to(tl.int64) * y_stride + block * BLOCK_OUT
        if SINGLE and num_rows == 1:
            total = tl.zeros([BLOCK_N], dtype=tl.float32)
            for item in range(begin, end):
                page, h_row, weight = item_page(
                    items_ptr, item, begin, page_0, h_row_0, bits_0, RECORD
                )
                b = tl.load(b_tile + page * b_page_stride, mask=in_block[None, :], other=0.0)
                if OVERLAP:
                    gdc_wait()
                shares = tl.load(
                    h_in + splits[:, None] * h_split_stride + h_row * WIDTH + ranks[None, :]
                )
                h = tl.sum(shares, axis=0)
                total += tl.sum(b.to(tl.float32) * (h * weight)[:, None], axis=0)
            base = tl.load(y_start + n, mask=in_block, other=0.0)
            tl.store(y_start + n, (base.to(tl.float32) + total).to(base.dtype), mask=in_block)
        else:
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            in_chunk = rows[:, None] < num_rows
            y_tile = y_start + rows[:, None] * y_stride + n[None, :]
            in_tile = in_chunk & in_block[None, :]
            if EARLY:
                # All loads of the first page are under way together.
                if OVERLAP:
                    gdc_wait()
                y = tl.load(y_tile, mask=in_tile, other=0.0)
            for item in range(begin, end):
                page, h_row, weight = item_page(
                    items_ptr, item, begin, page_0, h_row_0, bits_0, RECORD
                )
                b = tl.load(b_tile + page * b_page_stride, mask=in_block[None, :], other=0.0)
                if OVERLAP:
                    gdc_wait()
                h_rows = h_in + (h_row + rows[:, None]) * WIDTH + ranks[None, :]
                h = shrunk_rows(h_rows, in_chunk, h_split_stride, SHARED_SPLITS)
                acc = tl.dot((h * weight).to(b.dtype), b, acc, input_precision="ieee")
            if not EARLY:
                y = tl.load(y_tile, mask=in_tile, other=0.0)
            tl.store(y_tile, (y.to(tl.float32) + acc).to(y.dtype), mask=in_tile)
        work += tl.num_programs(0)
        row_start, num_rows, begin, end, page_0, h_row_0, bits_0 = plan_chunk(
            plan_ptr, work // UNITS, max_chunks, HEADER, RECORD
        )
    if OVERLAP:
        gdc_wait()


def sgmv_expand(
    h: torch.Tensor,
    B: torch.Tensor,
    plan: SGMVTables,
    y: torch.Tensor,
    *,
    site: int,
    tiles: SGMVTiles,
) -> None:
    """y[rows] += Σ_p weight_p · h[p] · B_p, in place, output block by output block.

    Args:
        h: what ``sgmv_shrink`` wrote: fp32 [splits, h_rows, slices · 16].
        B: [pages, blocks, 16, block_out] of one layer; only the page stride is free. The last
            ``slices`` blocks have a slice of h each, those before them share the first.
        plan: the plan that the shrink ran with.
        y: [rows, blocks · block_out], last dimension contiguous; other rows keep their bits.
        site: index into ``SITES``.
    """
    overlap = overlaps_launches()
    units = plan.usual_chunks * B.shape[1] * triton.cdiv(B.shape[3], tiles.block_n)
    _expand_kernel[(max(1, min(tiles.num_programs, units)),)](
        h,
        B,
        plan.data[site],
        y,
        plan.items_at,
        plan.max_chunks,
        B.stride(0),
        y.stride(0),
        h.stride(0),
        HEADER=PLAN_HEADER_INTS,
        RECORD=PLAN_RECORD_INTS,
        BLOCKS=B.shape[1],
        BLOCK_OUT=B.shape[3],
        SLICES=h.shape[2] // PAGE_RANK,
        SPLITS=tiles.splits,
        SHARED_SPLITS=tiles.shared_splits,
        SINGLE=tiles.single_rows,
        BLOCK_M=tiles.chunk_rows,
        BLOCK_N=tiles.block_n,
        RANK=PAGE_RANK,
        # A single warp has not the registers to hold y meanwhile.
        EARLY=tiles.expand_warps > 1,
        OVERLAP=overlap,
        **launch_options(overlap),
        num_warps=tiles.expand_warps,
        # Pipelining would move the loads of h ahead of the wait for the shrink.
        num_stages=1,
    )
