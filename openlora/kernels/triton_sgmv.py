# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""SGMV in Triton: the LoRA deltas of a batch that mixes adapters, in two launches a site.

For a chunk c of rows that share a LoRA set, and that set's pages p with weights w_p::

    shrink   h[p, rows] = x[rows] · A_p                    (fp32, split over K)
    expand   y[rows]   += Σ_p w_p · h[p, rows] · B_p       (in place, into the base output)

After Chen et al., "Punica: Multi-Tenant LoRA Serving" (2023). What differs: the unit is a rank-16
page, so ranks mix without padding to the largest; the split-K partial sums are stored apart and
added by the expand in a fixed order, so nothing is zero-filled and repeats are bit-equal; and the
work counts are read on the device, so one CUDA graph serves every mix.

The kernels loop over their work (a *persistent* grid): the number of programs launched does not
grow with the largest batch a graph must be able to hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from openlora.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch_options,
    overlaps_launches,
)

PAGE_RANK = 16
"""Rank of a page, as the pool lays it out."""
PLAN_HEADER_INTS = 16
PLAN_RECORD_INTS = 8
"""Ints of a site's header in a plan, and of each record; see openlora.engine.sgmv_plan."""


@dataclass(frozen=True, slots=True)
class SGMVTiles:
    """How a launch is cut: chosen once per (site, kind of step), compiled in.

    Attributes:
        chunk_rows: most rows of one chunk of the plan (a power of two, at least 16).
        splits: parts that K is cut into (a power of two); each is pulled by its own program.
        shared_splits: as ``splits``, at most as many, for chunks of more than one row: these bring
            their own parallelism, and every part is one more sum for the expand to read.
        block_k: K elements a program loads at once; divides nothing in particular (masked).
        block_n: output columns of one expand program.
        num_programs: size of the persistent grid.
    """

    chunk_rows: int
    splits: int
    shared_splits: int
    block_k: int
    block_n: int
    num_programs: int
    shrink_warps: int = 4
    expand_warps: int = 4


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    plan_ptr,
    h_ptr,
    items_at,
    max_items,
    x_stride,
    a_page_stride,
    h_split_stride,
    RECORD: tl.constexpr,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    K_SPLIT: tl.constexpr = ((K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)) * BLOCK_K
    K_SHARED: tl.constexpr = (
        (K + SHARED_SPLITS * BLOCK_K - 1) // (SHARED_SPLITS * BLOCK_K)
    ) * BLOCK_K
    WIDTH: tl.constexpr = SLICES * RANK
    UNITS: tl.constexpr = SLICES * SPLITS
    items_ptr = plan_ptr + items_at
    # The first record is asked for beside the number of records: one wait instead of two.
    work = tl.program_id(0)
    item = work // UNITS
    in_table = item < max_items
    page = tl.load(items_ptr + item * RECORD, mask=in_table, other=0)
    row_start = tl.load(items_ptr + item * RECORD + 1, mask=in_table, other=0)
    num_rows = tl.load(items_ptr + item * RECORD + 2, mask=in_table, other=0)
    h_row = tl.load(items_ptr + item * RECORD + 3, mask=in_table, other=0)
    num_units = tl.load(plan_ptr) * UNITS
    ranks = tl.arange(0, RANK)
    rows = tl.arange(0, BLOCK_M)
    ks = tl.arange(0, BLOCK_K)
    if OVERLAP:
        gdc_launch_dependents()
    while work < num_units:
        # Slices vary fastest: the programs that share cache lines of A run side by side.
        split = (work // SLICES) % SPLITS
        part = work % SLICES
        a_tile = a_ptr + page.to(tl.int64) * a_page_stride + part * RANK + ranks[None, :]
        h_out = h_ptr + split * h_split_stride + part * RANK
        if num_rows == 1:
            k_start = split * K_SPLIT
            k_end = min(k_start + K_SPLIT, K)
            x_row = x_ptr + row_start.to(tl.int64) * x_stride
            total = tl.zeros([RANK], dtype=tl.float32)
            for offset in tl.static_range(0, K_SPLIT, BLOCK_K):
                k = k_start + offset + ks
                a = tl.load(a_tile + k[:, None] * WIDTH, mask=k[:, None] < k_end, other=0.0)
                if OVERLAP:
                    gdc_wait()
                x = tl.load(x_row + k, mask=k < k_end, other=0.0)
                total += tl.sum(a.to(tl.float32) * x.to(tl.float32)[:, None], axis=0)
            tl.store(h_out + h_row.to(tl.int64) * WIDTH + ranks, total)
        elif split < SHARED_SPLITS:
            k_start = split * K_SHARED
            k_end = min(k_start + K_SHARED, K)
            x_rows = x_ptr + (row_start + rows[:, None]).to(tl.int64) * x_stride
            in_chunk = rows[:, None] < num_rows
            # The first tile of the page is asked for before the wait, as it is with one row.
            k = k_start + ks
            a = tl.load(a_tile + k[:, None] * WIDTH, mask=k[:, None] < k_end, other=0.0)
            if OVERLAP:
                gdc_wait()
            x = tl.load(x_rows + k[None, :], mask=in_chunk & (k[None, :] < k_end), other=0.0)
            acc = tl.dot(x, a, input_precision="ieee")
            for offset in range(BLOCK_K, K_SHARED, BLOCK_K):
                k = k_start + offset + ks
                a = tl.load(a_tile + k[:, None] * WIDTH, mask=k[:, None] < k_end, other=0.0)
                x = tl.load(x_rows + k[None, :], mask=in_chunk & (k[None, :] < k_end), other=0.0)
                acc = tl.dot(x, a, acc, input_precision="ieee")
            h_rows = (h_row + rows[:, None]).to(tl.int64) * WIDTH
            tl.store(h_out + h_rows + ranks[None, :], acc, mask=in_chunk)
        work += tl.num_programs(0)
        item = work // UNITS
        in_table = item < max_items
        page = tl.load(items_ptr + item * RECORD, mask=in_table, other=0)
        row_start = tl.load(items_ptr + item * RECORD + 1, mask=in_table, other=0)
        num_rows = tl.load(items_ptr + item * RECORD + 2, mask=in_table, other=0)
        h_row = tl.load(items_ptr + item * RECORD + 3, mask=in_table, other=0)
    if OVERLAP:
        # Also without work: the end of this launch must mean the end of those before it.
        gdc_wait()


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
    OVERLAP: tl.constexpr,
):
    TILES: tl.constexpr = (BLOCK_OUT + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = SLICES * RANK
    UNITS: tl.constexpr = BLOCKS * TILES
    chunks_ptr = plan_ptr + HEADER
    items_ptr = plan_ptr + items_at
    num_units = tl.load(plan_ptr + 1) * UNITS
    ranks = tl.arange(0, RANK)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    splits = tl.arange(0, SPLITS)
    if OVERLAP:
        gdc_launch_dependents()
    work = tl.program_id(0)
    record = chunks_ptr + (work // UNITS) * RECORD
    in_table = work // UNITS < max_chunks
    row_start = tl.load(record, mask=in_table, other=0)
    num_rows = tl.load(record + 1, mask=in_table, other=0)
    item_begin = tl.load(record + 2, mask=in_table, other=0)
    item_end = tl.load(record + 3, mask=in_table, other=0)
    first_page = tl.load(record + 4, mask=in_table, other=0)
    first_h_row = tl.load(record + 5, mask=in_table, other=0)
    first_weight = tl.load(record + 6, mask=in_table, other=0)
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
            for item in range(item_begin, item_end):
                other = items_ptr + item * RECORD
                is_other = item != item_begin
                page = tl.load(other, mask=is_other, other=first_page).to(tl.int64)
                h_row = tl.load(other + 3, mask=is_other, other=first_h_row).to(tl.int64)
                bits = tl.load(other + 4, mask=is_other, other=first_weight)
                weight = bits.to(tl.float32, bitcast=True)
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
            for item in range(item_begin, item_end):
                other = items_ptr + item * RECORD
                is_other = item != item_begin
                page = tl.load(other, mask=is_other, other=first_page).to(tl.int64)
                h_row = tl.load(other + 3, mask=is_other, other=first_h_row).to(tl.int64)
                bits = tl.load(other + 4, mask=is_other, other=first_weight)
                weight = bits.to(tl.float32, bitcast=True)
                b = tl.load(b_tile + page * b_page_stride, mask=in_block[None, :], other=0.0)
                h_rows = h_in + (h_row + rows[:, None]) * WIDTH + ranks[None, :]
                if OVERLAP:
                    gdc_wait()
                h = tl.zeros([BLOCK_M, RANK], dtype=tl.float32)
                for split in tl.static_range(SHARED_SPLITS):
                    h += tl.load(h_rows + split * h_split_stride, mask=in_chunk, other=0.0)
                acc = tl.dot((h * weight).to(b.dtype), b, acc, input_precision="ieee")
            y_tile = y_start + rows[:, None] * y_stride + n[None, :]
            in_tile = in_chunk & in_block[None, :]
            y = tl.load(y_tile, mask=in_tile, other=0.0)
            tl.store(y_tile, (y.to(tl.float32) + acc).to(y.dtype), mask=in_tile)
        work += tl.num_programs(0)
        record = chunks_ptr + (work // UNITS) * RECORD
        in_table = work // UNITS < max_chunks
        row_start = tl.load(record, mask=in_table, other=0)
        num_rows = tl.load(record + 1, mask=in_table, other=0)
        item_begin = tl.load(record + 2, mask=in_table, other=0)
        item_end = tl.load(record + 3, mask=in_table, other=0)
        first_page = tl.load(record + 4, mask=in_table, other=0)
        first_h_row = tl.load(record + 5, mask=in_table, other=0)
        first_weight = tl.load(record + 6, mask=in_table, other=0)
    if OVERLAP:
        gdc_wait()


@dataclass(frozen=True, slots=True)
class SGMVTables:
    """A plan on the device, as ``openlora.engine.sgmv_plan`` lays it out.

    Attributes:
        data: int32 [sites, ints].
        items_at: ints from a site's header to its items.
        max_chunks, max_items: records that the tables hold.
        usual_chunks, usual_items: records that a launch has programs for; more are looped over.
    """

    data: torch.Tensor
    items_at: int
    max_chunks: int
    max_items: int
    usual_chunks: int
    usual_items: int


def sgmv_shrink(
    x: torch.Tensor,
    A: torch.Tensor,
    plan: SGMVTables,
    h: torch.Tensor,
    *,
    site: int,
    tiles: SGMVTiles,
) -> None:
    """h[split, p] = the K-part's share of x[rows of p] · A_p, for every (chunk, page) p.

    Args:
        x: [rows, K], last dimension contiguous.
        A: [pages, K, slices · 16] of one layer; only the page stride is free.
        plan: on the device of ``x``, its chunks of at most ``tiles.chunk_rows`` rows.
        h: fp32 [splits, at least the plan's h_rows, slices · 16]; written where there is work.
        site: index into ``SITES``; chooses the plan's tables.

    An empty plan launches and does nothing. Rows in no chunk (base model) are never read.
    """
    slices = A.shape[2] // PAGE_RANK
    overlap = overlaps_launches()
    units = plan.usual_items * slices * tiles.splits
    _shrink_kernel[(max(1, min(tiles.num_programs, units)),)](
        x,
        A,
        plan.data[site],
        h,
        plan.items_at,
        plan.max_items,
        x.stride(0),
        A.stride(0),
        h.stride(0),
        RECORD=PLAN_RECORD_INTS,
        K=x.shape[1],
        SLICES=slices,
        SPLITS=tiles.splits,
        SHARED_SPLITS=tiles.shared_splits,
        BLOCK_M=tiles.chunk_rows,
        BLOCK_K=tiles.block_k,
        RANK=PAGE_RANK,
        OVERLAP=overlap,
        **launch_options(overlap),
        num_warps=tiles.shrink_warps,
    )


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
        OVERLAP=overlap,
        **launch_options(overlap),
        num_warps=tiles.expand_warps,
        # Pipelining would move the loads of h ahead of the wait for the shrink.
        num_stages=1,
    )
