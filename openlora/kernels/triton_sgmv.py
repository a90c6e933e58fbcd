# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""SGMV in Triton: the LoRA deltas of a batch that mixes adapters, in two launches a site.

The first of them is here, the other in ``triton_sgmv_expand`` (and ``triton_sgmv_gated``).

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
        shrink_warps, shrink_stages, expand_warps: of the launches. Stages take shared memory, and
            with it the programs that a processor holds.
        fuses_gate: of gate and up, the expand computes the activation as well.
        single_rows: chunks of one row have a path of their own, which sums without tensor cores
            and so may round otherwise.
    """

    chunk_rows: int
    splits: int
    shared_splits: int
    block_k: int
    block_n: int
    num_programs: int
    shrink_warps: int = 4
    shrink_stages: int = 1
    expand_warps: int = 4
    fuses_gate: bool = True
    single_rows: bool = True


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
    SINGLE: tl.constexpr,
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
        if SINGLE and num_rows == 1:
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
        SINGLE=tiles.single_rows,
        BLOCK_M=tiles.chunk_rows,
        BLOCK_K=tiles.block_k,
        RANK=PAGE_RANK,
        OVERLAP=overlap,
        **launch_options(overlap),
        num_warps=tiles.shrink_warps,
        num_stages=tiles.shrink_stages,
    )
