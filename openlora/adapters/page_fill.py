"""The pages of a site, filled from the tensors of an adapter's files: natively or in torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from openlora.adapters.lora_set import PAGE_RANK, SITES
from openlora.adapters.peft_format import AdapterLayout, LoRAModule
from openlora.adapters.site_shapes import ModelShape, SiteModule, SiteShape
from openlora.errors import AdapterFailed
from openlora.kernels.native.library import TYPES, NativeKernels, PageFill

if TYPE_CHECKING:
    from openlora.adapters.extra_loader import ExtraLoader
    from openlora.adapters.loader import FileTensors, Zeros

_NATIVE = {"F32": TYPES[torch.float32], "BF16": TYPES[torch.bfloat16]}


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """One site's pages on CPU: ``a`` and ``b`` as in ``SitePageTensors``, scale folded into b."""

    a: torch.Tensor
    b: torch.Tensor


def load_site(
    layout: AdapterLayout,
    shape: SiteShape,
    model: ModelShape,
    dtype: torch.dtype,
    tensors: FileTensors,
    zeros: Zeros,
    extras: ExtraLoader | None,
    native: NativeKernels | None = None,
) -> SiteWeights:
    """The pages of one site, of an adapter that ``check_modules`` has passed.

    Args:
        layout, tensors: the adapter's.
        dtype: of the pages.
        zeros: makes them.
        extras: what gives DoRA's gains; None: it has no extras.
        native: fills the pages of an adapter without extras, where it knows the types.

    Raises:
        AdapterFailed: a value is not finite, or does not fit ``dtype``.
    """
    plan = _plan(layout, shape, model.num_layers, dtype)
    a, b = zeros(plan.a_shape, dtype), zeros(plan.b_shape, dtype)
    if native is not None and plan.fills is not None and extras is None:
        fills = plan.fills.copy()
        fills["source"] += tensors.addresses()[plan.files]
        fills["target"] += np.where(fills["is_b"], b.data_ptr(), a.data_ptr()).astype(np.uint64)
        is_finite = native.fill_pages(fills)
    else:
        _fill_in_torch(layout, shape, plan.modules, dtype, tensors, extras, a, b)
        # One sum for all: anything that is not finite makes it so.
        is_finite = _sum_is_finite(a) and _sum_is_finite(b)
    if not is_finite:
        for module in plan.modules:
            _check_finite(module, tensors, dtype)
    return SiteWeights(a.flatten(3), b)


@dataclass(frozen=True, slots=True)
class _FillPlan:
    """How the pages of a site come from files of one layout.

    Attributes:
        modules: that are of the site.
        a_shape: [pages, layers, in_features, slices, R].
        b_shape: as in ``SitePageTensors``.
        fills: ``PageFill``, sources counted from the start of their file and targets from that of
            A or B; None where the native routine does not know a type.
        files: for each of them, its file's place among the layout's.
    """

    modules: tuple[LoRAModule, ...]
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    fills: np.ndarray | None
    files: np.ndarray


# Adapters of one recipe share it. Making it takes the interpreter 2 ms for an 8B model's linears,
# in which neither a step nor another load goes on.
@lru_cache(maxsize=32 * len(SITES))
def _plan(
    layout: AdapterLayout, shape: SiteShape, num_layers: int, dtype: torch.dtype
) -> _FillPlan:
    slots = {module.path: (index, module) for index, module in enumerate(shape.modules)}
    modules = tuple(module for module in layout.modules if module.path in slots)
    pages = max((-(-module.rank // PAGE_RANK) for module in modules), default=0)
    a_shape = (pages, num_layers, shape.in_features, len(slots), PAGE_RANK)
    b_shape = (pages, num_layers, len(shape.block_slices), PAGE_RANK, shape.block_out)
    a_page, a_layer, a_in, a_slot = _strides(a_shape)[:4]
    b_page, b_layer, b_block, b_rank = _strides(b_shape)[:4]
    to_type = TYPES.get(dtype)
    numbers = {name: index for index, (name, _) in enumerate(layout.files)}
    fills, files = [], []
    for module in modules:
        index, place = slots[module.path]
        from_a, from_b = layout.tensors[module.a], layout.tensors[module.b]
        if to_type is None or "F16" in (from_a.dtype, from_b.dtype):
            return _FillPlan(modules, a_shape, b_shape, None, np.empty(0, np.intp))
        to_a = dtype.itemsize * (module.layer * a_layer + index * a_slot)
        to_b = dtype.itemsize * (module.layer * b_layer + place.first_block * b_block)
        size, block = shape.in_features, shape.block_out
        fills += [
            (
                *(from_a.start, to_a, module.rank, size, a_page, a_in, 1, 0),
                *(0, _NATIVE[from_a.dtype], to_type, 1.0),
            ),
            (
                *(from_b.start, to_b, module.rank, place.out_features),
                *(b_page, b_rank, block, b_block),
                *(1, _NATIVE[from_b.dtype], to_type, module.scale),
            ),
        ]
        files += [numbers[from_a.file], numbers[from_b.file]]
    array = np.array(fills, np.dtype(PageFill))
    return _FillPlan(modules, a_shape, b_shape, array, np.array(files, np.intp))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """In elements, of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def _fill_in_torch(
    layout: AdapterLayout,
    shape: SiteShape,
    modules: Sequence[LoRAModule],
    dtype: torch.dtype,
    tensors: FileTensors,
    extras: ExtraLoader | None,
    a: torch.Tensor,
    b: torch.Tensor,
) -> None:
    slots = {module.path: (index, module) for index, module in enumerate(shape.modules)}
    for alike in _alike(modules, layout):
        module, layers = alike[0], slice(alike[0].layer, alike[-1].layer + 1)
        index, place = slots[module.path]
        # [layers, rank, in_features] and [layers, out_features, rank]: one copy for all layers.
        # Many small ones would wait for the interpreter between any two, and keep it from others.
        lora_a = torch.stack([tensors.get(each.a) for each in alike])
        lora_b = torch.stack([tensors.get(each.b) for each in alike])
        _fill(a[:, layers, :, index], lora_a.mT)
        scaled = _scaled(lora_b, module.scale, dtype)
        gains = [None if extras is None else extras.gain(each) for each in alike]
        for layer, gain in enumerate(gains):
            if gain is not None:
                scaled[layer] = scaled[layer] * gain[:, None]
        _fill_blocks(b[:, layers], place, shape.block_out, scaled)


def _alike(modules: Sequence[LoRAModule], layout: AdapterLayout) -> Iterable[list[LoRAModule]]:
    """Runs of the same linear in layer after layer, of one rank, scale and dtype."""

    def kind(module: LoRAModule) -> tuple[object, ...]:
        a, b = layout.tensors[module.a], layout.tensors[module.b]
        return module.path, module.rank, module.scale, a.dtype, b.dtype

    run: list[LoRAModule] = []
    for module in sorted(modules, key=lambda module: (module.path, module.layer)):
        if run and (kind(module) != kind(run[-1]) or module.layer != run[-1].layer + 1):
            yield run
            run = []
        run.append(module)
    if run:
        yield run


def _scaled(b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """lora_B times the scale, rounded once where the file has another dtype than the pages."""
    # A product in the pages' own dtype is made in fp32 and rounded once as well.
    return (b if b.dtype == dtype else b.float()) * scale


def _sum_is_finite(tensor: torch.Tensor) -> bool:
    # In its own dtype, for a sum in another makes a copy first. What overflows is only looked at.
    return bool(tensor.sum().isfinite())


def _check_finite(module: LoRAModule, tensors: FileTensors, dtype: torch.dtype) -> None:
    for name in (module.a, module.b):
        if not tensors.get(name).isfinite().all():
            raise AdapterFailed(f"tensor {name} holds values that are not finite")
    if not tensors.get(module.a).to(dtype).isfinite().all():
        raise AdapterFailed(f"tensor {module.a} does not fit {dtype}")
    if not _scaled(tensors.get(module.b), module.scale, dtype).to(dtype).isfinite().all():
        raise AdapterFailed(
            f"{module.name}: lora_B times its scale {module.scale:g} does not fit {dtype}"
        )


def _fill(pages: torch.Tensor, a: torch.Tensor) -> None:
    """a: [layers, in_features, rank] into pages: [pages, layers, in_features, R]."""
    for page, part in enumerate(torch.split(a, PAGE_RANK, dim=-1)):
        pages[page, :, :, : part.shape[-1]] = part


def _fill_blocks(pages: torch.Tensor, place: SiteModule, block_out: int, b: torch.Tensor) -> None:
    """b: [layers, out_features, rank] into its blocks of pages: [pages, layers, blocks, R, out]."""
    blocks = b.view(b.shape[0], -1, block_out, b.shape[2]).mT
    last = place.first_block + blocks.shape[1]
    for page, part in enumerate(torch.split(blocks, PAGE_RANK, dim=2)):
        pages[page, :, place.first_block : last, : part.shape[2]] = part
