"""SGMV: the low-rank updates of many adapters in one batch (Chen et al. 2023, Punica).

A site's pages are two tensors. ``A`` is [pages, in_features, slices · R]: a page's A matrices,
transposed, of the modules that share the input (q, k, v: 3 slices; gate, up: 2; else 1).
``B`` is [pages, blocks, R, block_out]: the output cut into equal blocks, each fed by one slice
(q is num_heads / num_kv_heads blocks of k's size). R is the page rank. Scale is folded into B.

Rows of equal LoRA set lie together as a segment. Few rows are summed row by row of A and B
straight from the pages (a weighted embedding bag: bytes are read once, nothing is gathered);
many rows of one segment are two matrix products per page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BAG_ROWS = 8
"""Segments of up to this many rows go through bags; above, matrix products are faster."""

Pages = tuple[tuple[int, float], ...]
"""(page ID, weight) pairs of one site."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``start``..``end`` share ``pages`` (at least one)."""

    start: int
    end: int
    pages: Pages


@dataclass(frozen=True, slots=True)
class BagPlan:
    """Index tensors of the rows that go through bags. A pair is one (row, page).

    Attributes:
        first, last: the range of rows touched.
        pair_rows: [pairs] int64, each pair's row of x; None: rows first..last, one page each.
        weights: [pairs, 1] of the pages' dtype; None: all 1.
        shrink_rows, shrink_offsets: bags over A as [-1, slices · R], one per pair.
        expand_source: [samples / R] int64, rows of the shrunk [pairs · slices, R]; None: in order.
        expand_rows, expand_offsets: bags over B as [-1, block_out], one per (row, block).
    """

    first: int
    last: int
    pair_rows: torch.Tensor | None
    weights: torch.Tensor | None
    shrink_rows: torch.Tensor
    shrink_offsets: torch.Tensor
    expand_source: torch.Tensor | None
    expand_rows: torch.Tensor
    expand_offsets: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoRAPlan:
    """One site's segments in one step; serves every layer.

    Attributes:
        block_slices: which slice of A feeds each block of B.
        bags: plan of the short segments; None: there are none.
        products: the long segments.
    """

    block_slices: tuple[int, ...]
    bags: BagPlan | None
    products: tuple[Segment, ...]


def sgmv(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, plan: LoRAPlan
) -> None:
    """y[s] += Σ over (page, w) of s: w · (x[s] A[page]) B[page], for each segment s; in place.

    Args:
        y: [rows, blocks · block_out].
        x: [rows, in_features], same dtype.
        A: [pages, in_features, slices · R] of one layer; the page stride is a multiple of the
            last axis, the rest contiguous.
        B: [pages, blocks, R, block_out] likewise.
        plan: from ``plan_lora`` for tensors of these shapes and strides.

    Rows outside every segment are left alone; without segments nothing is done.
    """
    if plan.bags is not None:
        _sgmv_bags(y, x, A, B, plan.bags)
    for segment in plan.products:
        _sgmv_products(y, x, A, B, segment, plan.block_slices)


def _sgmv_bags(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, plan: BagPlan
) -> None:
    rows = plan.pair_rows
    x = x[plan.first : plan.last] if rows is None else x.index_select(0, rows)
    shrunk = torch.embedding_bag(
        _rows_of(A), plan.shrink_rows, plan.shrink_offsets, per_sample_weights=x.reshape(-1)
    )[0]
    if plan.weights is not None:
        shrunk.mul_(plan.weights)
    rank = B.shape[2]
    shrunk = shrunk.view(-1, rank)
    if plan.expand_source is not None:
        shrunk = shrunk.index_select(0, plan.expand_source)
    out = torch.embedding_bag(
        _rows_of(B), plan.expand_rows, plan.expand_offsets, per_sample_weights=shrunk.view(-1)
    )[0]
    y[plan.first : plan.last].add_(out.view(plan.last - plan.first, -1))


def _sgmv_products(
    y: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    segment: Segment,
    block_slices: tuple[int, ...],
) -> None:
    _, blocks, rank, block_out = B.shape
    rows = slice(segment.start, segment.end)
    x = x[rows]
    y = y[rows].view(-1, blocks, block_out)
    for page, weight in segment.pages:
        shrunk = x @ A[page]
        if weight != 1.0:
            shrunk.mul_(weight)
        for block, source in enumerate(block_slices):
            y[:, block].addmm_(shrunk[:, source * rank : (source + 1) * rank], B[page, block])


def _rows_of(pages: torch.Tensor) -> torch.Tensor:
    """All of a layer's pages as rows of the last axis, what lies between pages included."""
    width = pages.shape[-1]
    stride = pages.stride(0)
    rows = ((pages.shape[0] - 1) * stride + pages[0].numel()) // width
    return pages.as_strided((rows, width), (width, 1))


def plan_lora(
    segments: Sequence[Segment],
    A: torch.Tensor,
    B: torch.Tensor,
    block_slices: tuple[int, ...],
) -> LoRAPlan | None:
    """The plan of one site for one step; None where there are no segments.

    Args:
        segments: in row order, not overlapping.
        A, B: the site's pages of any layer (shapes and strides alone are used).
        block_slices: one entry per block of B.
    """
    if not segments:
        return None
    short = [segment for segment in segments if segment.end - segment.start <= BAG_ROWS]
    long = tuple(segment for segment in segments if segment.end - segment.start > BAG_ROWS)
    return LoRAPlan(block_slices, _plan_bags(short, A, B, block_slices) if short else None, long)


def _plan_bags(
    segments: Sequence[Segment],
    A: torch.Tensor,
    B: torch.Tensor,
    block_slices: tuple[int, ...],
) -> BagPlan:
    _, in_features, width = A.shape
    _, blocks, rank, block_out = B.shape
    slices = width // rank
    first, last = segments[0].start, segments[-1].end
    by_row: list[Pages] = [()] * (last - first)
    for segment in segments:
        for row in range(segment.start, segment.end):
            by_row[row - first] = segment.pages
    pair_rows: list[int] = []
    pair_pages: list[int] = []
    pair_weights: list[float] = []
    sources: list[int] = []
    expand_starts: list[int] = []
    bag_sizes: list[int] = []
    page_stride = B.stride(0) // block_out
    for row, pages in enumerate(by_row):
        pair = len(pair_rows)
        for block in range(blocks):
            bag_sizes.append(len(pages) * rank)
            for offset, (page, _) in enumerate(pages):
                sources.append((pair + offset) * slices + block_slices[block])
                expand_starts.append(page * page_stride + block * rank)
        for page, weight in pages:
            pair_rows.append(first + row)
            pair_pages.append(page)
            pair_weights.append(weight)
    device = A.device
    shrink_starts = torch.tensor(pair_pages, device=device) * (A.stride(0) // width)
    sizes = torch.tensor(bag_sizes, device=device)
    plain = sources == list(range(len(pair_rows) * slices))
    return BagPlan(
        first=first,
        last=last,
        pair_rows=None
        if pair_rows == list(range(first, last))
        else torch.tensor(pair_rows, device=device),
        weights=None
        if all(weight == 1.0 for weight in pair_weights)
        else torch.tensor(pair_weights, dtype=A.dtype, device=device)[:, None],
        shrink_rows=_ranges(shrink_starts, in_features),
        shrink_offsets=torch.arange(len(pair_rows), device=device) * in_features,
        expand_source=None if plain else torch.tensor(sources, device=device),
        expand_rows=_ranges(torch.tensor(expand_starts, device=device), rank),
        expand_offsets=sizes.cumsum(0) - sizes,
    )


def _ranges(starts: torch.Tensor, length: int) -> torch.Tensor:
    """start, start + 1, … start + length - 1 of every start, in one flat tensor."""
    return (starts[:, None] + torch.arange(length, device=starts.device)).view(-1)
