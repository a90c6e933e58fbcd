"""The packages that can compute attention: whether they are there, and what they cope with."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from openlora.kernels.flash_attention import FlashAttention, FlashAttention2, FlashAttention4

if TYPE_CHECKING:
    from openlora.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a backend has to cope with.

    Attributes:
        capability: of the GPU.
        dtype: of the model and its KV cache.
        head_dim: of a head.
        block_size: positions of a KV block.
        soft_cap: whether scores are capped.
    """

    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    block_size: int
    soft_cap: bool = False

    @classmethod
    def of(
        cls, model: ModelConfig, dtype: torch.dtype, block_size: int, capability: tuple[int, int]
    ) -> AttentionNeeds:
        """Those of a model."""
        return cls(capability, dtype, model.head_dim, block_size, bool(model.attention_soft_cap))


@dataclass(frozen=True, slots=True)
class Library:
    """A package that computes attention.

    Attributes:
        name: as settings name it.
        distribution: its package.
        module: what is imported.
        install: how to get it.
        obstacle: why it cannot be used for given needs, and what to change; None: it can.
        make: the adapter around the module.
    """

    name: str
    distribution: str
    module: str
    install: str
    obstacle: Callable[[AttentionNeeds, str], str | None]
    make: Callable[[Any], FlashAttention]

    def version(self) -> str | None:
        """Of the installed package; None: there is none."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Without an import: why it cannot serve ``needs``; None: it should."""
        version = self.version()
        if version is not None:
            return self.obstacle(needs, version)
        obstacle = self.obstacle(needs, "")
        if obstacle is None:
            return f"it is not installed: {self.install}"
        return f"it is not installed ({self.install}), and {obstacle}"

    def load(self) -> FlashAttention:
        """Import it.

        Raises:
            LibraryBroken: the import fails, in one line.
        """
        try:
            return self.make(importlib.import_module(self.module))
        # An import runs code of any kind, and compiled parts of another torch fail in their own
        # ways; the caller decides whether that ends the start.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise LibraryBroken(
                f"{self.module} does not import ({lines[0]}): reinstall {self.distribution} for "
                f"torch {torch.__version__}"
            ) from error


class LibraryBroken(Exception):
    """An installed library cannot be imported."""


def _flash_attn_4_obstacle(needs: AttentionNeeds, version: str) -> str | None:
    # Blocks that are as long as a tile of keys are loaded whole, what lies behind the end of a
    # context included; a NaN there, of another tenant's request, would be part of the sum.
    if needs.block_size > 32:
        return (
            f"it reads what an earlier request left in blocks of 64 and more, and block_size is "
            f"{needs.block_size}; set block_size to 16 or 32"
        )
    if needs.capability[0] not in (9, 10):
        return (
            "its paged cache needs compute capability 9 or 10, and this GPU has "
            f"{needs.capability[0]}.{needs.capability[1]}"
        )
    # On 10.x there are more limits, and one more kernel for 256 alone.
    widest = 256 if needs.capability[0] == 9 else 128
    if needs.head_dim % 16 or needs.head_dim > widest:
        return f"it takes heads of 16, 32, … {widest}, and the model's have {needs.head_dim}"
    return _dtype_obstacle(needs)


def _flash_attn_2_obstacle(needs: AttentionNeeds, version: str) -> str | None:
    if needs.block_size % 256:
        return (
            f"its paged cache needs blocks of 256, and block_size is {needs.block_size}; set "
            "block_size to 256"
        )
    if needs.capability < (8, 0):
        return (
            "it needs compute capability 8.0, and this GPU has "
            f"{needs.capability[0]}.{needs.capability[1]}"
        )
    if needs.head_dim % 8 or needs.head_dim > 256:
        return f"it takes heads of 8, 16, … 256, and the model's have {needs.head_dim}"
    if needs.soft_cap and version and _numbers(version) < (2, 6):
        return f"soft caps need 2.6, and {version} is installed; upgrade flash-attn"
    return _dtype_obstacle(needs)


def _dtype_obstacle(needs: AttentionNeeds) -> str | None:
    if needs.dtype in (torch.bfloat16, torch.float16):
        return None
    dtype = str(needs.dtype).removeprefix("torch.")
    return f"it computes in bfloat16 and float16, not in {dtype}; set dtype to one of them"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


LIBRARIES: tuple[Library, ...] = (
    Library(
        "flash-attn-4",
        "flash-attn-4",
        "flash_attn.cute",
        "pip install 'openlora[flash]'",
        _flash_attn_4_obstacle,
        FlashAttention4,
    ),
    Library(
        "flash-attn-2",
        "flash-attn",
        "flash_attn",
        "pip install flash-attn, which compiles it",
        _flash_attn_2_obstacle,
        FlashAttention2,
    ),
)
