# ruff: noqa: ANN001, ANN202 - Triton kernels take pointers and compile-time constants.
"""The expand of SGMV in Triton of gate and up, on through the gated activation.

See ``triton_sgmv`` for the shrink, whose result it reads, and for the plan it follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openlora.kernels.triton_activation import activate
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
    SINGLE: tl.constexpr,
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
    work, num_units = begin_chunks(plan_ptr, UNITS, OVERLAP)
    ranks = tl.arange(0, RANK)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    splits = tl.arange(0, SPLITS)
    row_start, num_rows, begin, end, page_0, h_row_0, bits_0 = plan_chunk(
        plan_ptr, work // UNITS, max_chunks, HEADER, RECORD
    )
    while work < num_units:
        n = (work % UNITS) * BLOCK_N + columns
        in_block = n < INNER
        b_gate = b_ptr + ranks[:, None] * INNER + n[None, :]
        b_up = b_gate + RANK * INNER
        y_start = y_ptr + row_start.to(tl.int64) * (2 * INNER)
        out_start = out_ptr + row_start.to(tl.int64) * INNER
        if SINGLE and num_rows == 1:
            gate_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
            up_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
            for item in range(begin, end):
                page, h_row, weight = item_page(
                    items_ptr, item, begin, page_0, h_row_0, bits_0, RECORD
                )
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
                page, h_row, weight = item_page(
                    items_ptr, item, begin, page_0, h_row_0, bits_0, RECORD
                )
                at = page * b_page_stride
                gate_b = tl.load(b_gate + at, mask=in_block[None, :], other=0.0)
                up_b = tl.load(b_up + at, mask=in_block[None, :], other=0.0)
                if OVERLAP:
                    gdc_wait()
                h_in = h_ptr + (h_row + rows[:, None]) * WIDTH + ranks[None, :]
                gate_h = shrunk_rows(h_in, in_chunk, h_split_stride, SHARED_SPLITS) * weight
                up_h = shrunk_rows(h_in + UP_PART, in_chunk, h_split_stride, SHARED_SPLITS)
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
        row_start, num_rows, begin, end, page_0, h_row_0, bits_0 = plan_chunk(
            plan_ptr, work // UNITS, max_chunks, HEADER, RECORD
        )
    if OVERLAP:
        gdc_wait()


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
        SINGLE=tiles.single_rows,
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
