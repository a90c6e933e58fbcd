"""A step's LoRA work as the native kernels read it: groups of rows with the same pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openlora.kernels.native.library import MAX_GROUP, Site

Run = tuple[int, int, tuple[tuple[int, float], ...]]
"""Rows start..end (exclusive) of the same (page ID, weight) pairs, which may be none."""


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site's groups, and the tensors that ``site`` points into.

    Attributes:
        site: what goes into a ``Step``.
    """

    site: Site
    tensors: tuple[torch.Tensor, ...]


def plan_site(runs: Sequence[Run], width: int) -> SitePlan | None:
    """The plan of one site; None where no row has pages.

    Args:
        runs: cover all rows of the step, in order.
        width: slices · page rank of the site.
    """
    if not any(pages for _, _, pages in runs):
        return None
    tasks: list[tuple[int, int, int, int]] = []
    rows: list[tuple[int, int, int, int]] = []
    groups: list[tuple[int, int]] = []
    page_ids: list[int] = []
    weights: list[float] = []
    num_shrunk = 0
    for start, end, pages in runs:
        first_page = len(page_ids)
        page_ids += [page for page, _ in pages]
        weights += [weight for _, weight in pages]
        for first in range(start, end, MAX_GROUP):
            count = min(MAX_GROUP, end - first)
            for index, (page, _) in enumerate(pages):
                tasks.append((first, count, page, num_shrunk + index * count))
            rows += [(first_page, len(pages), num_shrunk + row, count) for row in range(count)]
            groups.append((first, count))
            num_shrunk += count * len(pages)
    tensors = (
        torch.tensor(tasks, dtype=torch.int32),
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(groups, dtype=torch.int32),
        torch.tensor(page_ids, dtype=torch.int32),
        torch.tensor(weights, dtype=torch.float32),
        torch.empty(num_shrunk * width, dtype=torch.float32),
    )
    site = Site(len(tasks), len(groups), *(tensor.data_ptr() for tensor in tensors))
    return SitePlan(site, tensors)
