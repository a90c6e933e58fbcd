# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""The expand of SGMV in Triton: into a linear's output, or on through a gated activation.

See ``triton_sgmv`` for the shrink, whose result these read, and for the plan they follow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openlora.kernels.triton_fused import activate
from openlora.kernels.triton_launch import (
    gdc_launch_dependents,
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


@triton.jit
def _chunk(plan_ptr, index, max_chunks, HEADER: tl.constexpr, RECORD: tl.constexpr):
    """First row, rows, first item, end item, and page, row of h and weight of the first item."""
    record = plan_ptr + HEADER + index * RECORD
    in_table = index < max_chunks
    return (
        tl.load(record, mask=in_table, other=0),
        tl.load(record + 1, mask=in_table, other=0),
        tl.load(record + 2, mask=in_table, other=0),
        tl.load(record + 3, mask=in_table, other=0),
        tl.load(record + 4, mask=in_table, other=0),
        tl.load(record + 5, mask=in_table, other=0),
        tl.load(record + 6, mask=in_table, other=0),
    )


@triton.jit
def _page(items_ptr, item, first_item, page, h_row, bits, RECORD: tl.constexpr):
    """Page, first row of h and weight of an item; those of the first are known from its chunk."""
    record = items_ptr + item * RECORD
    is_other = item != first_item
    page = tl.load(record, mask=is_other, other=page).to(tl.int64)
    h_row = tl.load(record + 3, mask=is_other, other=h_row).to(tl.int64)
    bits = tl.load(record + 4, mask=is_other, other=bits)
    return page, h_row, bits.to(tl.float32, bitcast=True)


@triton.jit
def _shrunk_rows(h_ptr, in_chunk, h_split_stride, SPLITS: tl.constexpr):
    """The sum of the parts of some rows of h, always in the same order."""
    total = tl.load(h_ptr, mask=in_chunk, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(h_ptr + split * h_split_stride, mask=in_chunk, other=0.0)
    return total


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
    num_units = tl.load(plan_ptr + 1) * UNITS
    ranks = tl.arange(0, RANK)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    splits = tl.arange(0, SPLITS)
    if OVERLAP:
        gdc_launch_dependents()
    work = tl.program_id(0)
    row_start, num_rows, begin, end, page_0, h_row_0, bits_0 = _chunk(
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
        if num_rows == 1:
            total = tl.zeros([BLOCK_N], dtype=tl.float32)
            for item in range(begin, end):
                page, h_row, weight = _page(items_ptr, item, begin, page_0, h_row_0, bits_0, RECORD)
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
                page, h_row, weight = _page(items_ptr, item, begin, page_0, h_row_0, bits_0, RECORD)
                b = tl.load(b_tile + page * b_page_stride, mask=in_block[None, :], other=0.0)
                if OVERLAP:
                    gdc_wait()
                h_rows = h_in + (h_row + rows[:, None]) * WIDTH + ranks[None, :]
                h = _shrunk_rows(h_rows, in_chunk, h_split_stride, SHARED_SPLITS)
                acc = tl.dot((h * weight).to(b.dtype), b, acc, input_precision="ieee")
            if not EARLY:
                y = tl.load(y_tile, mask=in_tile, other=0.0)
            tl.store(y_tile, (y.to(tl.float32) + acc).to(y.dtype), mask=in_tile)
        work += tl.num_programs(0)
        row_start, num_rows, begin, end, page_0, h_row_0, bits_0 = _chunk(
            plan_ptr, work // UNITS, max_chunks, HEADER, RECORD
        )
    if OVERLAP:
        gdc_wait()


@triton.jit
def _gated_kernel(
    h_ptr,
    b_ptr,
    plan_ptr,
    y_ptr,
    out_ptr,
    items_at,
    max_chunks,
    b_page_stride,
    h_split_stride,
    HEADER: tl.constexpr,
    RECORD: tl.constexpr,
    INNER: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    GELU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    UNITS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = SLICES * RANK
    UP_PART: tl.constexpr = (SLICES - 1) * RANK
    items_ptr = plan_ptr + items_at
    num_units = tl.load(plan_ptr + 1) * UNITS
    ranks = tl.arange(0, RANK)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    splits = tl.arange(0, SPLITS)
    if OVERLAP:
        gdc_launch_dependents()
    work = tl.program_id(0)
    row_start, num_rows, begin, end, page_0, h_row_0, bits_0 = _chunk(
        plan_ptr, work // UNITS, max_chunks, HEADER, RECORD
    )
    while work < num_units:
        n = (work % UNITS) * BLOCK_N + columns
        in_block = n < INNER
        b_gate = b_ptr + ranks[:, None] * INNER + n[None, :]
        b_up = b_gate + RANK * INNER
        y_start = y_ptr + row_start.to(tl.int64) * (2 * INNER)
        out_start = out_ptr + row_start.to(tl.int64) * INNER
        if num_rows == 1:
            gate_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
            up_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
            for item in range(begin, end):
                page, h_row, weight = _page(items_ptr, item, begin, page_0, h_row_0, bits_0, RECORD)
                at = page * b_page_stride
                gate_b = tl.load(b_gate + at, mask=in_block[None, :], other=0.0)
                up_b = tl.load(b_up + at, mask=in_block[None, :], other=0.0)
                if OVERLAP:
                    gdc_wait()
                h_in = h_ptr + splits[:, None] * h_split_stride + h_row * WIDTH + ranks[None, :]
                gate_h = tl.sum(tl.load(h_in), axis=0) * weight
                up_h = tl.sum(tl.load(h_in + UP_PART), axis=0) * weight
                gate_sum += tl.sum(gate_b.to(tl.float32) * gate_h[:, None], axis=0)
                up_sum += tl.sum(up_b.to(tl.float32) * up_h[:, None], axis=0)
            if OVERLAP:
                gdc_wait()
            gate_row = tl.load(y_start + n, mask=in_block, other=0.0)
            up_row = tl.load(y_start + INNER + n, mask=in_block, other=0.0)
            gate_row = (gate_row.to(tl.float32) + gate_sum).to(gate_row.dtype)
            up_row = (up_row.to(tl.float32) + up_sum).to(up_row.dtype)
            tl.store(out_start + n, activate(gate_row, up_row, GELU), mask=in_block)
        else:
            gate_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            up_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            in_chunk = rows[:, None] < num_rows
            for item in range(begin, end):
                page, h_row, weight = _page(items_ptr, item, begin, page_0, h_row_0, bits_0, RECORD)
                at = page * b_page_stride
                gate_b = tl.load(b_gate + at, mask=in_block[None, :], other=0.0)
                up_b = tl.load(b_up + at, mask=in_block[None, :], other=0.0)
                if OVERLAP:
                    gdc_wait()
                h_in = h_ptr + (h_row + rows[:, None]) * WIDTH + ranks[None, :]
                gate_h = _shrunk_rows(h_in, in_chunk, h_split_stride, SHARED_SPLITS) * weight
                up_h = _shrunk_rows(h_in + UP_PART, in_chunk, h_split_stride, SHARED_SPLITS)
                up_h = up_h * weight
                gate_acc = tl.dot(gate_h.to(gate_b.dtype), gate_b, gate_acc, input_precision="ieee")
                up_acc = tl.dot(up_h.to(up_b.dtype), up_b, up_acc, input_precision="ieee")
            if OVERLAP:
                gdc_wait()
            in_tile = in_chunk & in_block[None, :]
            y_tile = y_start + rows[:, None] * (2 * INNER) + n[None, :]
            gate = tl.load(y_tile, mask=in_tile, other=0.0)
            up = tl.load(y_tile + INNER, mask=in_tile, other=0.0)
            gate = (gate.to(tl.float32) + gate_acc).to(gate.dtype)
            up = (up.to(tl.float32) + up_acc).to(up.dtype)
            out_tile = out_start + rows[:, None] * INNER + n[None, :]
            tl.store(out_tile, activate(gate, up, GELU), mask=in_tile)
        work += tl.num_programs(0)
        row_start, num_rows, begin, end, page_0, h_row_0, bits_0 = _chunk(
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


def sgmv_expand_gated(
    h: torch.Tensor,
    B: torch.Tensor,
    plan: SGMVTables,
    y: torch.Tensor,
    *,
    site: int,
    tiles: SGMVTiles,
    activation: str,
) -> torch.Tensor:
    """act(gate) · up, where (gate, up) = y + Σ_p weight_p · h[p] · B_p; y is left as it is.

    One pass over y in place of two, rounded as ``sgmv_expand`` and the activation would.

    Args:
        h, B, site: as for ``sgmv_expand``, with two blocks, gate and up.
        plan: the shrink's; its chunks must cover all rows, those without pages included.
        y: [rows, 2 · inner] contiguous.
        activation: "silu" or "gelu_tanh".

    Returns:
        A new [rows, inner]; rows in no chunk are not written.
    """
    inner = B.shape[3]
    out = y.new_empty(y.shape[0], inner)
    overlap = overlaps_launches()
    units = plan.usual_chunks * triton.cdiv(inner, tiles.block_n)
    _gated_kernel[(max(1, min(tiles.num_programs, units)),)](
        h,
        B,
        plan.data[site],
        y,
        out,
        plan.items_at,
        plan.max_chunks,
        B.stride(0),
        h.stride(0),
        HEADER=PLAN_HEADER_INTS,
        RECORD=PLAN_RECORD_INTS,
        INNER=inner,
        SLICES=h.shape[2] // PAGE_RANK,
        SPLITS=tiles.splits,
        SHARED_SPLITS=tiles.shared_splits,
        BLOCK_M=tiles.chunk_rows,
        BLOCK_N=tiles.block_n,
        RANK=PAGE_RANK,
        GELU=activation == "gelu_tanh",
        OVERLAP=overlap,
        **launch_options(overlap),
        num_warps=tiles.expand_warps,
        num_stages=1,
    )
    return out
