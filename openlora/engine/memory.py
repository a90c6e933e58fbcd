"""How many LoRA pages and KV blocks fit the memory that the weights leave. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openlora.engine.config import EngineConfig
from openlora.errors import SetupError

_MIB = 1 << 20
CPU_KV_CACHE_BYTES = 512 * _MIB
CPU_ADAPTER_CACHE_BYTES = 256 * _MIB
CUDA_RESERVE_BYTES = 1024 * _MIB
"""Left free for activations, logits and the libraries' workspaces."""
_ADAPTER_SHARE = 0.2
"""Of what is left beside the weights, where the settings name no size."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``num_pages`` of each site and ``num_blocks`` KV blocks."""

    num_pages: tuple[int, ...]
    num_blocks: int


def usable_bytes(config: EngineConfig, device: str, free: int, total: int) -> int:
    """What weights, pages and blocks may take of a device.

    On CUDA the device is the engine's own: ``memory_fraction`` counts from its whole memory. On
    a CPU other processes have their share already: it counts from what is free.

    Args:
        device: "cpu" or "cuda".
        free, total: bytes of the device.
    """
    if device == "cuda":
        return max(0, int(free - total * (1 - config.memory_fraction)) - CUDA_RESERVE_BYTES)
    return int(free * config.memory_fraction)


def check_weights(config: EngineConfig, device: str, weight_bytes: int, usable: int) -> None:
    """Refuse a model that does not fit, before it is loaded.

    Raises:
        SetupError: with both sizes.
    """
    if weight_bytes > usable:
        raise SetupError(
            f"the weights of {config.model} take {_size(weight_bytes)} and {_size(usable)} are "
            f"usable on {device}; use a smaller model or a smaller dtype, raise memory_fraction "
            f"({config.memory_fraction}), or free memory"
        )


def plan_memory(
    config: EngineConfig,
    device: str,
    *,
    page_bytes: Sequence[int],
    block_bytes: int,
    usable: int,
) -> MemoryPlan:
    """The sizes of the two pools.

    What the settings give exactly is taken, or refused; where they leave a size open, adapters
    get a fifth of the memory and the KV cache the rest, on a CPU no more than 256 and 512 MiB.

    Args:
        device: "cpu" or "cuda", for its defaults and for messages.
        page_bytes: of one page of each site.
        block_bytes: of one KV block.
        usable: bytes that both pools may take together.

    Raises:
        SetupError: what was asked for does not fit, with what does and the settings to lower.
    """
    num_pages = _wanted_pages(config, page_bytes)
    num_blocks = _wanted_blocks(config, block_bytes)
    pages_size = None if num_pages is None else _total(num_pages, page_bytes)
    blocks_size = None if num_blocks is None else num_blocks * block_bytes
    if (pages_size or 0) + (blocks_size or 0) > usable:
        raise SetupError(_too_large(config, device, page_bytes, block_bytes, usable))
    if num_pages is None:
        budget = min(int(usable * _ADAPTER_SHARE), usable - (blocks_size or 0))
        if device == "cpu":
            budget = min(budget, CPU_ADAPTER_CACHE_BYTES)
        num_pages = _pages_for(budget, page_bytes)
    if num_blocks is None:
        budget = usable - _total(num_pages, page_bytes)
        if device == "cpu":
            budget = min(budget, CPU_KV_CACHE_BYTES)
        num_blocks = budget // block_bytes
    if num_blocks < 1:
        raise SetupError(
            f"not one KV block of {config.block_size} tokens ({_size(block_bytes)}) fits: "
            f"{_size(usable)} are usable on {device} beside the weights, and "
            f"{_pages(num_pages)} of adapters take {_size(_total(num_pages, page_bytes))}; "
            "lower adapter_cache_bytes or block_size, raise memory_fraction or kv_cache_bytes, or "
            "use a smaller model"
        )
    return MemoryPlan(num_pages, num_blocks)


def check_context(config: EngineConfig, num_blocks: int, block_bytes: int) -> None:
    """Refuse a ``max_model_len`` of which the KV cache does not hold a single request.

    Raises:
        SetupError: with the numbers.
    """
    wanted, held = config.max_model_len, num_blocks * config.block_size
    if wanted is not None and wanted > held:
        needed = -(-wanted // config.block_size)
        raise SetupError(
            f"max_model_len is {wanted}, but the KV cache holds {held} tokens ({num_blocks} "
            f"blocks of {config.block_size}); lower max_model_len, or give the cache {needed} "
            f"blocks (kv_cache_bytes {needed * block_bytes})"
        )


def _wanted_pages(config: EngineConfig, page_bytes: Sequence[int]) -> tuple[int, ...] | None:
    if config.adapter_pages is not None:
        return config.adapter_pages
    if config.adapter_cache_bytes is not None:
        return _pages_for(config.adapter_cache_bytes, page_bytes)
    return None


def _wanted_blocks(config: EngineConfig, block_bytes: int) -> int | None:
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes // block_bytes
    return None


def _pages_for(budget: int, page_bytes: Sequence[int]) -> tuple[int, ...]:
    """As many pages of every site as fit, the same number of each: an adapter of rank 16 on all
    linears takes one of each."""
    return (max(budget, 0) // sum(page_bytes),) * len(page_bytes)


def _total(num_pages: Sequence[int], page_bytes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(num_pages, page_bytes, strict=True))


def _too_large(
    config: EngineConfig, device: str, page_bytes: Sequence[int], block_bytes: int, usable: int
) -> str:
    """Which settings ask for too much, and what would fit beside the other."""
    pages, blocks = _wanted_pages(config, page_bytes), _wanted_blocks(config, block_bytes)
    parts, fits, settings = [], [], []
    pages_size = 0 if pages is None else _total(pages, page_bytes)
    blocks_size = 0 if blocks is None else blocks * block_bytes
    if pages is not None:
        parts.append(f"{_pages(pages)} of adapters take {_size(pages_size)}")
        count = _pages_for(usable - blocks_size, page_bytes)[0]
        fits.append(f"{count} pages of each site")
        settings.append(
            "adapter_pages" if config.adapter_pages is not None else "adapter_cache_bytes"
        )
    if blocks is not None:
        parts.append(f"{blocks} KV blocks take {_size(blocks_size)}")
        fits.append(f"{max(usable - pages_size, 0) // block_bytes} KV blocks")
        settings.append("num_kv_blocks" if config.num_kv_blocks is not None else "kv_cache_bytes")
    beside = " beside the other" if len(fits) > 1 else ""
    return (
        f"{' and '.join(parts)}, but {_size(usable)} are usable on {device} beside the weights; "
        f"{' or '.join(fits)} would fit{beside}: lower {' or '.join(settings)}"
    )


def _pages(num_pages: Sequence[int]) -> str:
    if len(set(num_pages)) == 1:
        return f"{num_pages[0]} pages of each site"
    return f"{' + '.join(map(str, num_pages))} pages"


def _size(num_bytes: int) -> str:
    if num_bytes >= 1024 * _MIB:
        return f"{num_bytes / (1024 * _MIB):.1f} GiB"
    return f"{num_bytes / _MIB:.1f} MiB"
