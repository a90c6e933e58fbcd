"""Which LoRA page works on which rows of a step: the tables the SGMV kernels read. Pure.

A *segment* is a run of adjacent rows with one LoRA set. It is cut into *chunks* of at most
``chunk_rows`` rows; a chunk and one page of its set make an *item*. Per site, in int32:

    header   [16]: number of items, number of chunks
    chunks   [max_chunks, 8]: first row, rows, first item, end item, and of the first item again its
             page, its first row of h and its weight, so that no kernel waits for the items table
    items    [max_items, 8]: page, first row, rows, first row of h, weight

A chunk of rows without pages has no items. Only ``GATE_UP`` has such: the kernel that adds its
deltas also activates, so its chunks cover all rows. Weights are fp32 bit patterns. Tables lie at
fixed places, whatever they hold: a kernel asks for its record before it knows how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openlora.adapters.lora_set import SITES, LoRASet
from openlora.kernels.triton_sgmv import PLAN_HEADER_INTS, PLAN_RECORD_INTS
from openlora.models.ops import GATE_UP

Ints = npt.NDArray[np.int32]

SHARED_ROWS = 6
"""Rows a chunk from which on the kernels for shared pages are the faster ones, on an H100."""


@dataclass(frozen=True, slots=True)
class SGMVPlan:
    """The LoRA work of a step.

    Attributes:
        items, chunks: per site, [n, 8].
        h_rows: rows of ``h`` used at the site that uses most.
    """

    items: tuple[Ints, ...]
    chunks: tuple[Ints, ...]
    h_rows: int

    @property
    def is_empty(self) -> bool:
        """True where no row has a page: the LoRA-free path serves this step."""
        return self.h_rows == 0

    @property
    def rows_share(self) -> bool:
        """Whether chunks have many rows on average, at the site that has most of them."""
        chunks = max(self.chunks, key=len)
        return bool(len(chunks)) and int(chunks[:, 1].sum()) >= SHARED_ROWS * len(chunks)

    @property
    def num_items(self) -> int:
        """Items of the site that has most."""
        return max(len(items) for items in self.items)

    @property
    def num_chunks(self) -> int:
        """Chunks of the site that has most."""
        return max(len(chunks) for chunks in self.chunks)


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Where the tables of a site lie, for up to so many records."""

    max_chunks: int
    max_items: int

    @property
    def items_at(self) -> int:
        """Ints from a site's header to its items."""
        return PLAN_HEADER_INTS + _even(self.max_chunks) * PLAN_RECORD_INTS

    @property
    def site_ints(self) -> int:
        """Ints of one site."""
        return self.items_at + _even(self.max_items) * PLAN_RECORD_INTS

    def fits(self, plan: SGMVPlan) -> bool:
        """Whether the tables hold ``plan``."""
        return plan.num_chunks <= self.max_chunks and plan.num_items <= self.max_items

    def fill(self, plan: SGMVPlan, packed: Ints) -> list[int]:
        """Write ``plan`` into ``packed`` [sites, site_ints]; returns how many ints a site uses."""
        used = []
        for row, items, chunks in zip(packed, plan.items, plan.chunks, strict=True):
            row[:2] = (len(items), len(chunks))
            row[PLAN_HEADER_INTS : PLAN_HEADER_INTS + chunks.size] = chunks.reshape(-1)
            row[self.items_at : self.items_at + items.size] = items.reshape(-1)
            used.append(self.items_at + items.size if len(chunks) else PLAN_HEADER_INTS)
        return used


def build_plan(
    lora_sets: Sequence[LoRASet], row_counts: Sequence[int], *, chunk_rows: int
) -> SGMVPlan:
    """The plan for adjacent groups of rows: ``row_counts[i]`` rows have ``lora_sets[i]``.

    Equal neighbours share a segment, so callers sort by LoRA set first. Base-model rows
    (``LoRASet.EMPTY``) and groups of no rows make no work.
    """
    segments: list[tuple[LoRASet, int, int]] = []
    row = 0
    for lora_set, count in zip(lora_sets, row_counts, strict=True):
        if segments and count and segments[-1][0] == lora_set:
            previous = segments[-1]
            segments[-1] = (lora_set, previous[1], previous[2] + count)
        elif count:
            segments.append((lora_set, row, count))
        row += count
    tables = [_site_tables(segments, site, chunk_rows) for site in range(len(SITES))]
    return SGMVPlan(
        items=tuple(items for items, _, _ in tables),
        chunks=tuple(chunks for _, chunks, _ in tables),
        h_rows=max(h_rows for _, _, h_rows in tables),
    )


def _site_tables(
    segments: Sequence[tuple[LoRASet, int, int]], site: int, chunk_rows: int
) -> tuple[Ints, Ints, int]:
    """Items and chunks of one site, and the rows of ``h`` they take."""
    items: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    h_row = 0
    for lora_set, first_row, num_rows in segments:
        pages = [(page, _bits(weight)) for page, weight in lora_set.pages[site]]
        if not pages and site != GATE_UP:
            continue
        first_page, first_bits = pages[0] if pages else (0, 0)
        for start in range(first_row, first_row + num_rows, chunk_rows):
            rows = min(chunk_rows, first_row + num_rows - start)
            first = len(items)
            chunks.append(
                (start, rows, first, first + len(pages), first_page, h_row, first_bits, 0)
            )
            for page, bits in pages:
                items.append((page, start, rows, h_row, bits, 0, 0, 0))
                h_row += rows
    return _table(items), _table(chunks), h_row


def _table(records: Sequence[tuple[int, ...]]) -> Ints:
    return np.array(records, np.int32).reshape(-1, PLAN_RECORD_INTS)


def _bits(weight: float) -> int:
    return int(np.float32(weight).view(np.int32))


def _even(count: int) -> int:
    # Tables then begin at multiples of 16 ints, which is one alignment for the compiler.
    return count + count % 2
