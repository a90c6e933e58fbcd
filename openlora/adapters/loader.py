"""A PEFT directory as pages: rank-16 slices of each site, in the layout of page_tensors.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from openlora.adapters.extra_format import words
from openlora.adapters.extras import AdapterExtras, BaseWeight, ExtraLoader
from openlora.adapters.lora_set import PAGE_RANK
from openlora.adapters.pages import PageCounts
from openlora.adapters.peft_format import (
    AdapterInfo,
    AdapterLayout,
    ContentHash,
    LoRAModule,
    describe,
    read_layout,
)
from openlora.adapters.site_shapes import ModelShape, SiteModule, SiteShape, site_shapes
from openlora.errors import AdapterFailed

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HASH = re.compile(r"[0-9a-f]{64}")

Zeros = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Makes a contiguous tensor of zeros on CPU, of a shape and dtype."""


def new_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """In memory of its own."""
    return torch.zeros(shape, dtype=dtype)


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
        extras: what it has beside pages; None: nothing.
    """

    info: AdapterInfo
    sites: tuple[SiteWeights, ...]
    extras: AdapterExtras | None = None

    @property
    def page_counts(self) -> PageCounts:
        """Pages it takes of each site: ⌈largest rank there / 16⌉."""
        return tuple(weights.a.shape[0] for weights in self.sites)


def load_adapter(
    directory: Path,
    model: ModelShape,
    dtype: torch.dtype,
    zeros: Zeros = new_zeros,
    base: BaseWeight | None = None,
) -> LoadedAdapter:
    """Read an adapter for ``model`` into tensors that ``zeros`` makes. Thread-safe; all on CPU.

    α/r (α/√r with rsLoRA) is folded into B before the rounding to ``dtype``. The files are read
    once: the bytes that were hashed are those that are used. An adapter with extras needs
    ``base``, the base model's weights.

    Raises:
        AdapterFailed: as ``inspect_adapter``; or it was made for another base model, lacks a
            module that its configuration targets, or holds values that are not finite; or a
            directory named by a content hash holds other content.
    """
    layout = read_layout(directory)
    shapes = site_shapes(model)
    check_modules(layout, shapes, model, takes_extras=True)
    tensors = FileTensors(directory, layout)
    if _HASH.fullmatch(directory.name) and tensors.hash != directory.name:
        raise AdapterFailed(
            f"the store's copy of adapter {directory.name} is damaged (its content has hash "
            f"{tensors.hash}); delete {directory} and add the adapter again"
        )
    # Fills and casts of small tensors: inference mode keeps them free of autograd's records.
    with torch.inference_mode():
        extras = None
        if layout.extras:
            extras = ExtraLoader(layout, shapes, model, dtype, tensors.get, base)
        sites = tuple(
            _load_site(layout, shape, model, dtype, tensors, zeros, extras) for shape in shapes
        )
        loaded = None if extras is None else extras.load()
    return LoadedAdapter(describe(layout, tensors.hash), sites, loaded)


class FileTensors:
    """The tensors of a directory's files, as they are there, and the hash of what was read."""

    def __init__(self, directory: Path, layout: AdapterLayout) -> None:
        self._entries = layout.tensors
        self._files: dict[str, torch.Tensor] = {}
        digest = ContentHash()
        for name, size in layout.files:
            # Read, not mapped: a file that is cut short meanwhile would end the process.
            data = torch.empty(size, dtype=torch.uint8)
            view = data.numpy().data
            with (directory / name).open("rb") as file:
                if file.readinto(view) != size:
                    raise AdapterFailed(f"{name} became shorter while it was read; load it again")
            digest.begin(name, size)
            digest.update(view)
            self._files[name] = data
        self.hash = digest.hexdigest()

    def get(self, name: str) -> torch.Tensor:
        """A tensor that shares the memory of its file."""
        entry = self._entries[name]
        dtype = _DTYPES[entry.dtype]
        whole = self._files[entry.file]
        # A view as another dtype wants its start aligned, which safetensors does not promise.
        part = whole[entry.start : entry.end]
        if entry.start % dtype.itemsize:
            part = part.clone()
        return part.view(dtype).view(entry.shape)


def _load_site(
    layout: AdapterLayout,
    shape: SiteShape,
    model: ModelShape,
    dtype: torch.dtype,
    tensors: FileTensors,
    zeros: Zeros,
    extras: ExtraLoader | None,
) -> SiteWeights:
    slots = {module.path: (index, module) for index, module in enumerate(shape.modules)}
    modules = [module for module in layout.modules if module.path in slots]
    pages = max((-(-module.rank // PAGE_RANK) for module in modules), default=0)
    a = zeros((pages, model.num_layers, shape.in_features, len(slots), PAGE_RANK), dtype)
    b = zeros((pages, model.num_layers, len(shape.block_slices), PAGE_RANK, shape.block_out), dtype)
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
    # One sum for all modules: anything that is not finite makes it so, and is then looked for.
    if not (_sum_is_finite(a) and _sum_is_finite(b)):
        for module in modules:
            _check_finite(module, tensors, dtype)
    return SiteWeights(a.flatten(3), b)


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
    return bool(tensor.sum(dtype=torch.float32).isfinite())


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


def check_modules(
    layout: AdapterLayout,
    shapes: Sequence[SiteShape],
    model: ModelShape,
    *,
    takes_extras: bool = False,
) -> None:
    """Every module exists in the model in this shape, and none that is targeted is missing.

    A caller that loads pages alone does not ``takes_extras``: adapters that have any are refused.
    """
    if layout.extras and not takes_extras:
        raise AdapterFailed(
            f"it has {words(layout.extras)}, which is not supported on this device; "
            "use device 'cpu'"
        )
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
    prefix = layout.modules[0].name.split("layers.", 1)[0] if layout.modules else "model."
    for layer in range(model.num_layers):
        for path in expected:
            name = f"{prefix}layers.{layer}.{path}"
            if (layer, path) not in present and layout.config.targets(name, layer):
                raise AdapterFailed(
                    f"{name}: lora_A and lora_B are missing, though adapter_config.json targets it"
                )
