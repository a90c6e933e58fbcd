# ruff: noqa: ANN001, ANN201 - Triton kernels take pointers and compile-time constants.
"""How the expand kernels of SGMV follow a plan: its chunks, their pages, the shrink's result."""

from __future__ import annotations

import triton
import triton.language as tl

from openlora.kernels.triton_launch import gdc_launch_dependents


@triton.jit
def begin_chunks(plan_ptr, UNITS: tl.constexpr, OVERLAP: tl.constexpr):
    """This program's first unit of work and the number of all, ``UNITS`` a chunk."""
    num_units = tl.load(plan_ptr + 1) * UNITS
    if OVERLAP:
        gdc_launch_dependents()
    return tl.program_id(0), num_units


@triton.jit
def plan_chunk(plan_ptr, index, max_chunks, HEADER: tl.constexpr, RECORD: tl.constexpr):
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
def item_page(items_ptr, item, first_item, page, h_row, bits, RECORD: tl.constexpr):
    """Page, first row of h and weight of an item; those of the first are known from its chunk."""
    record = items_ptr + item * RECORD
    is_other = item != first_item
    page = tl.load(record, mask=is_other, other=page).to(tl.int64)
    h_row = tl.load(record + 3, mask=is_other, other=h_row).to(tl.int64)
    bits = tl.load(record + 4, mask=is_other, other=bits)
    return page, h_row, bits.to(tl.float32, bitcast=True)


@triton.jit
def shrunk_rows(h_ptr, in_chunk, h_split_stride, SPLITS: tl.constexpr):
    """The sum of the parts of some rows of h, always in the same order."""
    total = tl.load(h_ptr, mask=in_chunk, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(h_ptr + split * h_split_stride, mask=in_chunk, other=0.0)
    return total
