"""A PEFT directory as pages: rank-16 slices of each site, in the layout of page_tensors.py."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from openlora.adapters.extra_loader import BaseWeight, ExtraLoader
from openlora.adapters.extras import AdapterExtras
from openlora.adapters.page_fill import SiteWeights, load_site
from openlora.adapters.pages import PageCounts
from openlora.adapters.peft_format import (
    AdapterInfo,
    AdapterLayout,
    ContentHash,
    describe,
    read_layout,
)
from openlora.adapters.site_shapes import ModelShape, SiteShape, site_shapes
from openlora.errors import AdapterFailed
from openlora.kernels.native.library import NativeKernels

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HASH = re.compile(r"[0-9a-f]{64}")
_ALIGNMENT = 64
_MAX_KEPT_BYTES = 256 << 20
"""Memory of larger files is not kept for the next; rank 16 of an 8B model's linears is 84 MB."""

Zeros = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Makes a contiguous tensor of zeros on CPU, of a shape and dtype."""


def new_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """In memory of its own."""
    return torch.zeros(shape, dtype=dtype)


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
    native: NativeKernels | None = None,
) -> LoadedAdapter:
    """Read an adapter for ``model`` into tensors that ``zeros`` makes. Thread-safe; all on CPU.

    α/r (α/√r with rsLoRA) is folded into B before the rounding to ``dtype``. The files are read
    once: the bytes that were hashed are those that are used. An adapter with extras needs
    ``base``, the base model's weights. ``native`` makes the same bits in a tenth of the time, with
    the interpreter's lock free.

    Raises:
        AdapterFailed: as ``inspect_adapter``; or it was made for another base model, lacks a
            module that its configuration targets, or holds values that are not finite; or a
            directory named by a content hash holds other content.
    """
    layout = read_layout(directory)
    shapes = _checked(layout, model)
    # Extras may keep what was read; pages never do.
    tensors = FileTensors(directory, layout, reuse_memory=not layout.extras)
    # Fills and casts of small tensors: inference mode keeps them free of autograd's records.
    with torch.inference_mode():
        extras = None
        if layout.extras:
            extras = ExtraLoader(layout, shapes, model, dtype, tensors.get, base)
        sites = tuple(
            load_site(layout, shape, model, dtype, tensors, zeros, extras, native)
            for shape in shapes
        )
        loaded = None if extras is None else extras.load()
    return LoadedAdapter(describe(layout, tensors.hash), sites, loaded)


@lru_cache(maxsize=32)
def _checked(layout: AdapterLayout, model: ModelShape) -> tuple[SiteShape, ...]:
    """The sites, of a layout that ``check_modules`` passes."""
    shapes = site_shapes(model)
    check_modules(layout, shapes, model)
    return shapes


def _new_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


class _Kept(threading.local):
    """Memory of a thread's last files. Fresh memory costs more than reading into it: each of its
    pages is a fault, and all threads take those under one lock."""

    memory: torch.Tensor | None = None


_KEPT = _Kept()


def _file_memory(num_bytes: int) -> torch.Tensor:
    """uint8, at least ``num_bytes``; the same for this thread's next call."""
    memory = _KEPT.memory
    if memory is None or len(memory) < num_bytes:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        _KEPT.memory = memory if num_bytes <= _MAX_KEPT_BYTES else None
    return memory


class FileTensors:
    """The tensors of a directory's files, as they are there, and the hash of what was read.

    Args:
        reuse_memory: they are valid until this thread's next such object.

    Raises:
        AdapterFailed: a file became shorter, or a directory named by a content hash holds other
            content.
    """

    def __init__(
        self, directory: Path, layout: AdapterLayout, *, reuse_memory: bool = False
    ) -> None:
        self._entries = layout.tensors
        self._files: dict[str, torch.Tensor] = {}
        digest = ContentHash()
        sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for _, size in layout.files]
        memory = (_file_memory if reuse_memory else _new_memory)(sum(sizes))
        parts = torch.split(memory[: sum(sizes)], sizes)
        for (name, size), part in zip(layout.files, parts, strict=True):
            # Read, not mapped: a file that is cut short meanwhile would end the process.
            data = part[:size]
            view = data.numpy().data
            with (directory / name).open("rb") as file:
                if file.readinto(view) != size:
                    raise AdapterFailed(f"{name} became shorter while it was read; load it again")
            digest.begin(name, size)
            digest.update(view)
            self._files[name] = data
        self.hash = digest.hexdigest()
        if _HASH.fullmatch(directory.name) and self.hash != directory.name:
            raise AdapterFailed(
                f"the store's copy of adapter {directory.name} is damaged (its content has hash "
                f"{self.hash}); add the adapter again"
            )

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

    def addresses(self) -> np.ndarray:
        """uint64 [files]: where each file of the layout begins in memory, of any alignment."""
        return np.array([data.data_ptr() for data in self._files.values()], np.uint64)


def check_modules(layout: AdapterLayout, shapes: Sequence[SiteShape], model: ModelShape) -> None:
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
    prefix = layout.modules[0].name.split("layers.", 1)[0] if layout.modules else "model."
    for layer in range(model.num_layers):
        for path in expected:
            name = f"{prefix}layers.{layer}.{path}"
            if (layer, path) not in present and layout.config.targets(name, layer):
                raise AdapterFailed(
                    f"{name}: lora_A and lora_B are missing, though adapter_config.json targets it"
                )
