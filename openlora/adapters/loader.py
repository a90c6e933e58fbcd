"""A PEFT directory as pages: rank-16 slices of each site, in the layout of page_tensors.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from openlora.adapters.lora_set import PAGE_RANK
from openlora.adapters.pages import PageCounts
from openlora.adapters.peft_format import (
    AdapterInfo,
    AdapterLayout,
    LoRAModule,
    describe,
    read_layout,
)
from openlora.adapters.site_shapes import ModelShape, SiteModule, SiteShape, site_shapes
from openlora.errors import AdapterFailed


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """One site's pages on CPU: ``a`` and ``b`` as in ``SitePageTensors``, scale folded into b."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter ready to be written into pages.

    Attributes:
        info: its description.
        sites: one entry per entry of ``SITES``; a site that it does not touch has no pages.
    """

    info: AdapterInfo
    sites: tuple[SiteWeights, ...]

    @property
    def page_counts(self) -> PageCounts:
        """Pages it takes of each site: ⌈largest rank there / 16⌉."""
        return tuple(weights.a.shape[0] for weights in self.sites)


def load_adapter(directory: Path, model: ModelShape, dtype: torch.dtype) -> LoadedAdapter:
    """Read an adapter for ``model``. Thread-safe; the tensors are on CPU.

    α/r (α/√r with rsLoRA) is folded into B in fp32, before the rounding to ``dtype``.

    Raises:
        AdapterFailed: as ``inspect_adapter``; or it was made for another base model, lacks a
            module that its configuration targets, or holds values that are not finite.
    """
    layout = read_layout(directory)
    shapes = site_shapes(model)
    _check_modules(layout, shapes, model)
    info = describe(directory, layout)
    tensors = _Tensors(directory, layout)
    # Fills and casts of small tensors: inference mode keeps them free of autograd's records.
    with torch.inference_mode():
        sites = tuple(_load_site(layout, shape, model, dtype, tensors) for shape in shapes)
    return LoadedAdapter(info, sites)


class _Tensors:
    """Tensors of the directory's files in fp32."""

    def __init__(self, directory: Path, layout: AdapterLayout) -> None:
        self._entries = layout.tensors
        self._files: dict[str, Any] = {
            name: safe_open(directory / name, framework="pt")
            for name in {entry.file for entry in layout.tensors.values()}
        }

    def get(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[self._entries[name].file].get_tensor(name)
        tensor = tensor.to(torch.float32)
        if not tensor.isfinite().all():
            raise AdapterFailed(f"tensor {name} holds values that are not finite")
        return tensor


def _load_site(
    layout: AdapterLayout,
    shape: SiteShape,
    model: ModelShape,
    dtype: torch.dtype,
    tensors: _Tensors,
) -> SiteWeights:
    slots = {module.path: (index, module) for index, module in enumerate(shape.modules)}
    modules = [module for module in layout.modules if module.path in slots]
    pages = max((-(-module.rank // PAGE_RANK) for module in modules), default=0)
    a = torch.zeros(
        (pages, model.num_layers, shape.in_features, len(slots), PAGE_RANK), dtype=dtype
    )
    b = torch.zeros(
        (pages, model.num_layers, len(shape.block_slices), PAGE_RANK, shape.block_out), dtype=dtype
    )
    for module in modules:
        index, place = slots[module.path]
        _fill(a[:, module.layer, :, index], tensors.get(module.a).T)
        scaled = tensors.get(module.b) * module.scale
        _check_range(module, scaled, dtype)
        _fill_blocks(b[:, module.layer], place, shape.block_out, scaled)
    return SiteWeights(a.flatten(3), b)


def _fill(pages: torch.Tensor, a: torch.Tensor) -> None:
    """a: [in_features, rank] into pages: [pages, in_features, R]."""
    for page, part in enumerate(torch.split(a, PAGE_RANK, dim=1)):
        pages[page, :, : part.shape[1]] = part


def _fill_blocks(pages: torch.Tensor, place: SiteModule, block_out: int, b: torch.Tensor) -> None:
    """b: [out_features, rank] into its blocks of pages: [pages, blocks, R, block_out]."""
    blocks = b.view(-1, block_out, b.shape[1]).transpose(1, 2)
    last = place.first_block + blocks.shape[0]
    for page, part in enumerate(torch.split(blocks, PAGE_RANK, dim=1)):
        pages[page, place.first_block : last, : part.shape[1]] = part


def _check_range(module: LoRAModule, scaled: torch.Tensor, dtype: torch.dtype) -> None:
    if scaled.abs().max() > torch.finfo(dtype).max:
        raise AdapterFailed(
            f"{module.name}: lora_B times its scale {module.scale:g} does not fit {dtype}"
        )


def _check_modules(layout: AdapterLayout, shapes: Sequence[SiteShape], model: ModelShape) -> None:
    """Every module exists in the model in this shape, and none that is targeted is missing."""
    expected = {
        module.path: (shape.in_features, module.out_features)
        for shape in shapes
        for module in shape.modules
    }
    base = layout.config.base_model or "another base model"
    present = set()
    for module in layout.modules:
        if module.path not in expected:
            raise AdapterFailed(f"{module.name} is no linear of this base model")
        if module.layer >= model.num_layers:
            raise AdapterFailed(
                f"{module.name}: this base model has {model.num_layers} layers; the adapter was "
                f"made for {base}"
            )
        a, b = layout.tensors[module.a].shape, layout.tensors[module.b].shape
        if (a[1], b[0]) != expected[module.path]:
            raise AdapterFailed(
                f"{module.name} maps {a[1]} to {b[0]} features; in this base model it maps "
                f"{expected[module.path][0]} to {expected[module.path][1]}: the adapter was made "
                f"for {base}"
            )
        present.add((module.layer, module.path))
    prefix = layout.modules[0].name.split("layers.", 1)[0]
    for layer in range(model.num_layers):
        for path in expected:
            name = f"{prefix}layers.{layer}.{path}"
            if (layer, path) not in present and layout.config.targets(name, layer):
                raise AdapterFailed(
                    f"{name}: lora_A and lora_B are missing, though adapter_config.json targets it"
                )
