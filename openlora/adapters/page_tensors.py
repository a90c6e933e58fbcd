"""The tensors behind the LoRA pages: one A and one B per site, a page holding all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from openlora.adapters.lora_set import PAGE_RANK
from openlora.adapters.pages import PageCounts, SitePages
from openlora.adapters.site_shapes import ModelShape, SiteShape, site_shapes

if TYPE_CHECKING:
    from openlora.adapters.loader import LoadedAdapter


class SitePageTensors:
    """Pages of one site.

    Attributes:
        shape: the site.
        a: [pages, layers, in_features, slices · R], A transposed.
        b: [pages, layers, blocks, R, block_out], B transposed, scale folded in.
        layers: per layer the views (a[:, layer], b[:, layer]) that ``sgmv`` takes.

    A page is outermost, so that writing one is a single contiguous copy.
    """

    def __init__(
        self,
        shape: SiteShape,
        num_pages: int,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        slices, blocks = len(shape.modules), len(shape.block_slices)
        self.shape = shape
        self.a = torch.zeros(
            (num_pages, num_layers, shape.in_features, slices * PAGE_RANK),
            dtype=dtype,
            device=device,
        )
        self.b = torch.zeros(
            (num_pages, num_layers, blocks, PAGE_RANK, shape.block_out), dtype=dtype, device=device
        )
        self.layers = tuple((self.a[:, i], self.b[:, i]) for i in range(num_layers))


class PageTensors:
    """All LoRA pages of one device.

    Args:
        model: the base model's shape.
        num_pages: pages of each site, in the order of ``SITES``.
        dtype, device: of the pages.
    """

    def __init__(
        self,
        model: ModelShape,
        num_pages: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.sites = tuple(
            SitePageTensors(shape, count, model.num_layers, dtype, torch.device(device))
            for shape, count in zip(site_shapes(model), num_pages, strict=True)
        )

    def write(self, pages: SitePages, adapter: LoadedAdapter) -> None:
        """Fill ``pages`` with ``adapter``; ranks, modules and layers it lacks become zero.

        The pages' previous content is gone; no launched step may still read them.
        """
        for site, ids, weights in zip(self.sites, pages, adapter.sites, strict=True):
            for index, page in enumerate(ids):
                site.a[page].copy_(weights.a[index], non_blocking=True)
                site.b[page].copy_(weights.b[index], non_blocking=True)


def page_bytes(model: ModelShape, dtype: torch.dtype) -> PageCounts:
    """Bytes of one page of each site, in the order of ``SITES``."""
    return tuple(
        shape.page_elements_per_layer * model.num_layers * dtype.itemsize
        for shape in site_shapes(model)
    )
