"""Which LoRA page works on which rows of a step: the tables the SGMV kernels read. Pure.

A *segment* is a run of adjacent rows with one LoRA set. It is cut into *chunks* of at most
``chunk_rows`` rows; a chunk and one page of its set make an *item*. All tables travel as one int32
array, so that a step costs one copy to the device:

    header   per site: num_items, items at, num_chunks, chunks at, weights at, three spare
    items    [num_items, 4]: page ID, first row, rows, first row of h
    chunks   [num_chunks, 4]: first row, rows, first item, end item
    weights  [num_items] fp32 bit patterns

Offsets are in ints from the start of the array; a site without pages has zero counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openlora.adapters.lora_set import SITES, LoRASet

HEADER_INTS = 8
"""Ints of one site's header."""


@dataclass(frozen=True, slots=True)
class SGMVPlan:
    """The packed tables, and how many rows of ``h`` they use at the site that uses most."""

    data: npt.NDArray[np.int32]
    h_rows: int

    @property
    def is_empty(self) -> bool:
        """True where no row has a page: the LoRA-free path serves this step."""
        return self.h_rows == 0


def max_plan_ints(rows: int, pages_per_row: int) -> int:
    """Ints of the largest plan for ``rows`` rows of at most ``pages_per_row`` pages a site."""
    return len(SITES) * (HEADER_INTS + rows * pages_per_row * 5 + rows * 4)


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
    header = np.zeros((len(SITES), HEADER_INTS), dtype=np.int32)
    tables: list[npt.NDArray[np.int32]] = []
    used = header.size
    most_h_rows = 0
    for site in range(len(SITES)):
        items, chunks, weights, h_rows = _site_tables(segments, site, chunk_rows)
        most_h_rows = max(most_h_rows, h_rows)
        packed = [
            np.asarray(items, dtype=np.int32),
            np.asarray(chunks, dtype=np.int32),
            np.asarray(weights, dtype=np.float32).view(np.int32),
        ]
        offsets = np.cumsum([used, packed[0].size, packed[1].size])
        header[site, :5] = (len(weights), offsets[0], len(chunks) // 4, offsets[1], offsets[2])
        used = int(offsets[2]) + packed[2].size
        tables += packed
    return SGMVPlan(np.concatenate([header.reshape(-1), *tables]), most_h_rows)


def _site_tables(
    segments: Sequence[tuple[LoRASet, int, int]], site: int, chunk_rows: int
) -> tuple[list[int], list[int], list[float], int]:
    """Flat items, chunks and weights of one site, and the rows of ``h`` they take."""
    items: list[int] = []
    chunks: list[int] = []
    weights: list[float] = []
    h_row = 0
    for lora_set, first_row, num_rows in segments:
        pages = lora_set.pages[site]
        if not pages:
            continue
        for start in range(first_row, first_row + num_rows, chunk_rows):
            rows = min(chunk_rows, first_row + num_rows - start)
            chunks += (start, rows, len(weights), len(weights) + len(pages))
            for page, weight in pages:
                items += (page, start, rows, h_row)
                weights.append(weight)
                h_row += rows
    return items, chunks, weights, h_row
