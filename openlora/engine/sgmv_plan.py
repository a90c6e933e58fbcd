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
"""Rows a chunk from which on the kernels for shared pages are the faster ones, on an H200."""
FEW_CHUNKS, SHARED_BY_FEW = 16, 2
"""With so few chunks they are from this many rows on."""


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
        least = SHARED_BY_FEW if len(chunks) <= FEW_CHUNKS else SHARED_ROWS
        return bool(len(chunks)) and int(chunks[:, 1].sum()) >= least * len(chunks)

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
    sets: list[LoRASet] = []
    starts: list[int] = []
    counts: list[int] = []
    row = 0
    for lora_set, count in zip(lora_sets, row_counts, strict=True):
        if sets and count and sets[-1] == lora_set:
            counts[-1] += count
        elif count:
            sets.append(lora_set)
            starts.append(row)
            counts.append(count)
        row += count
    rows = np.array([starts, counts], np.int32).reshape(2, -1)
    tables: list[tuple[Ints, Ints, int]] = []
    cut: _Cut | None = None
    for site in range(len(SITES)):
        pages = [lora_set.pages[site] for lora_set in sets]
        num_pages = np.array([len(entries) for entries in pages], np.int32)
        # Adapters mostly have as many pages at every site: then the rows are cut alike.
        if cut is None or not cut.serves(num_pages, keeps_all=site == GATE_UP):
            cut = _Cut.of(rows, num_pages, chunk_rows, keeps_all=site == GATE_UP)
        tables.append(cut.tables([entry for entries in pages for entry in entries]))
    return SGMVPlan(
        items=tuple(items for items, _, _ in tables),
        chunks=tuple(chunks for _, chunks, _ in tables),
        h_rows=max(h_rows for _, _, h_rows in tables),
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """The chunks and items of a site, all but their pages and weights.

    Attributes:
        num_pages: of each segment.
        keeps_all: whether segments without pages are in chunks too.
        chunks, items: as the tables, with zeros for pages and weights.
        entries: per item, which of all segments' entries it takes.
        h_rows: rows of ``h`` that the items take.
    """

    num_pages: Ints
    keeps_all: bool
    chunks: Ints
    items: Ints
    entries: Ints
    h_rows: int

    @classmethod
    def of(cls, segments: Ints, num_pages: Ints, chunk_rows: int, *, keeps_all: bool) -> _Cut:
        """``segments``: [2, n], first row and rows of each."""
        first_row, num_rows = segments
        num_chunks = -(-num_rows // chunk_rows)
        if not keeps_all:
            num_chunks = np.where(num_pages > 0, num_chunks, 0)
        segment, nth = _expanded(num_chunks)
        start = first_row[segment] + nth * chunk_rows
        rows = np.minimum(chunk_rows, first_row[segment] + num_rows[segment] - start)
        pages = num_pages[segment]
        chunk, place = _expanded(pages)
        h_ends = rows[chunk].cumsum(dtype=np.int32)
        h_row = h_ends - rows[chunk]
        ends = pages.cumsum(dtype=np.int32)
        chunks = np.zeros((len(segment), PLAN_RECORD_INTS), np.int32)
        chunks[:, :4] = np.stack([start, rows, ends - pages, ends], axis=1)
        h_rows = int(h_ends[-1]) if len(h_ends) else 0
        chunks[:, 5] = np.append(h_row, h_rows)[ends - pages]
        items = np.zeros((len(chunk), PLAN_RECORD_INTS), np.int32)
        items[:, 1:4] = np.stack([start[chunk], rows[chunk], h_row], axis=1)
        entries = (num_pages.cumsum(dtype=np.int32) - num_pages)[segment][chunk] + place
        return cls(num_pages, keeps_all, chunks, items, entries, h_rows)

    def serves(self, num_pages: Ints, *, keeps_all: bool) -> bool:
        """Whether segments of so many pages are cut like this."""
        return np.array_equal(num_pages, self.num_pages) and (
            keeps_all is self.keeps_all or bool(num_pages.all())
        )

    def tables(self, entries: Sequence[tuple[int, float]]) -> tuple[Ints, Ints, int]:
        """Items and chunks with the pages and weights of ``entries``, all segments' in order."""
        items, chunks = self.items.copy(), self.chunks.copy()
        if not len(items):
            return items, chunks, 0
        pages = np.array([page for page, _ in entries], np.int32)
        weights = np.array([weight for _, weight in entries], np.float32).view(np.int32)
        items[:, 0], items[:, 4] = pages[self.entries], weights[self.entries]
        has_pages = chunks[:, 2] < chunks[:, 3]
        chunks[has_pages, 4] = items[chunks[has_pages, 2], 0]
        chunks[has_pages, 6] = items[chunks[has_pages, 2], 4]
        return items, chunks, self.h_rows


def _expanded(counts: Ints) -> tuple[Ints, Ints]:
    """For each of ``counts`` as many entries: its index, and which one of them it is."""
    index = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    ends = counts.cumsum(dtype=np.int32)
    return index, np.arange(len(index), dtype=np.int32) - (ends - counts)[index]


def _even(count: int) -> int:
    # Tables then begin at multiples of 16 ints, which is one alignment for the compiler.
    return count + count % 2
