"""From settings to the parts an engine is made of: model, pools, runner."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openlora.adapters.lora_set import PAGE_RANK
from openlora.adapters.pages import PagePool, SitePages
from openlora.adapters.tier_stats import TierStats
from openlora.engine.adapter_fit import MOST_OVER
from openlora.engine.adapter_loads import Loaded
from openlora.engine.adapter_supply import MAX_STAGED
from openlora.engine.attention_backends import TRITON_ATTENTION, attention_for
from openlora.engine.config import EngineConfig
from openlora.engine.host_memory import available_memory
from openlora.engine.memory import check_context, check_weights, plan_memory, usable_bytes
from openlora.engine.stats import ModelInfo
from openlora.engine.step import Runner
from openlora.errors import SetupError

if TYPE_CHECKING:
    from openlora.kernels.native.library import NativeKernels
    from openlora.models.config import ModelConfig
    from openlora.models.weights import MakeLinear

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

STAGED_SHARE = 0.75
"""Of the host tier, for adapters on their way to pages: the others' last use was long ago."""
_CPU_HOST_BYTES = 1 << 30
_CPU_HOST_SHARE = 8
"""Of the memory that is free, so much at most: pages are host memory themselves there."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine drives.

    Attributes:
        runner: executes steps.
        model_info: as the engine reports it.
        num_blocks: KV blocks of the runner's cache.
        pool: book-keeper of the adapter pages.
        load_adapter: directory → adapter in host memory; called in background threads.
        write_adapter: puts it into pages; called on the engine thread, between steps.
        steps_ahead: launched steps that may be unread while the next one is launched. 0: each
            step is read at once. 1: the runner takes ``PENDING_TOKEN`` in a row's token IDs.
        num_load_threads: adapters read from disk at a time.
        cached_adapter: what ``load_adapter`` would return, where that takes no reading.
        is_in_memory: whether ``cached_adapter`` has a directory that is named by its content.
        max_staged: adapters loaded ahead of their pages.
        host_stats: of the host tier, given adapters' names by their paths; None: there is none.
        page_bytes: of one page of each site.
        step_sizes: numbers of tokens, in order, to the next of which the runner rounds a step up
            that has parts of prompts; larger ones it computes as they are.
    """

    runner: Runner
    model_info: ModelInfo
    num_blocks: int
    pool: PagePool
    load_adapter: Callable[[Path], Loaded]
    write_adapter: Callable[[SitePages, Any], None]
    steps_ahead: int = 0
    num_load_threads: int = 2
    cached_adapter: Callable[[Path], Loaded | None] | None = None
    is_in_memory: Callable[[Path], bool] = lambda path: False
    max_staged: int = MAX_STAGED
    host_stats: Callable[[Mapping[Path, str]], TierStats] | None = None
    page_bytes: tuple[int, ...] = ()
    step_sizes: tuple[int, ...] = ()


def choose_device(name: str) -> str:
    """ "cpu" or "cuda" for a device setting.

    Raises:
        SetupError: CUDA was asked for and is not there.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise SetupError("device is 'cuda' but torch finds no CUDA device; use device 'cpu'")
    return "cuda" if has_cuda and name != "cpu" else "cpu"


def build_parts(config: EngineConfig, progress: Progress | None = None) -> EngineParts:
    """Load the model and allocate the pools.

    Args:
        progress: called with (bytes loaded, bytes in all) while weights are read.

    Raises:
        SetupError: no such device, no memory, a context that does not fit the KV cache, or
            ``deterministic`` without CUDA.
        UnknownModel: the model cannot be found or is of another architecture.
    """
    # The model's rooms load torch kernels: imported here, so that a scripted engine does not.
    from openlora.adapters.loader import LoadedAdapter, load_adapter
    from openlora.adapters.page_tensors import PageTensors, page_bytes
    from openlora.engine.cpu_kernels import cpu_runner, native_kernels_for
    from openlora.engine.host_tier import HostMemory, HostTier
    from openlora.engine.kv_cache import KVCache, block_bytes
    from openlora.models.load import load_model

    device = choose_device(config.device)
    if config.deterministic and device != "cuda":
        raise SetupError(
            f"deterministic is set, but the device is {device!r}: only the kernels for CUDA can "
            "keep requests apart to the last bit; use a GPU, or do without"
        )
    dtype = "float32" if config.dtype == "auto" and device == "cpu" else config.dtype
    native = native_kernels_for(config.cpu_kernels, device, dtype)
    if device == "cpu" and config.attention_backend != "auto":
        raise SetupError(
            f"attention_backend is {config.attention_backend!r}, which needs a GPU, and the device "
            "is 'cpu'; set it to 'auto'"
        )
    with _named_out_of_memory(f"the weights of {config.model}", "use a smaller model or dtype"):
        model = load_model(
            config.model,
            dtype=dtype,
            device=device,
            load_format=config.load_format,
            progress=progress,
            configure=lambda model_config: _configured(config, device, dtype, model_config),
            make_linear=_make_linear(config, device, native),
        )
    size_of_block = block_bytes(model.config, model.dtype, config.block_size)
    plan = plan_memory(
        config,
        device,
        page_bytes=page_bytes(model.config, model.dtype),
        block_bytes=size_of_block,
        usable=_usable_bytes(config, device),
    )
    check_context(config, plan.num_blocks, size_of_block)
    num_pages, num_blocks = plan.num_pages, plan.num_blocks
    with _named_out_of_memory(
        f"{num_blocks} KV blocks and {num_pages} adapter pages",
        "lower memory_fraction, kv_cache_bytes or adapter_cache_bytes",
    ):
        pages = PageTensors(model.config, num_pages, model.dtype, model.device)
        kv_cache = KVCache(model.config, num_blocks, model.dtype, model.device, config.block_size)
    if native is not None:
        model.attention_backend = "native"
    # The cache may hold less than the model's own limit.
    model.limit_context(num_blocks * config.block_size)
    attention = TRITON_ATTENTION
    if device == "cuda":
        attention = attention_for(config, model.config, model.dtype)
        model.attention_backend = attention.name
    info = _model_info(config, model, num_pages)
    logger.info(
        "model %s on %s in %s, attention by %s; %d KV blocks of %d, contexts up to %d, "
        "pages per site %s",
        *(info.model, info.device, info.dtype, info.attention_backend),
        *(num_blocks, config.block_size, info.max_model_len, num_pages),
    )
    if device == "cuda":
        for remark in attention.remarks:
            logger.info("%s", remark)
        # Not at the top: it needs Triton, which a machine without a GPU may lack.
        from openlora.engine.cuda_parts import cuda_parts

        with _named_out_of_memory(
            f"graphs for {config.max_num_seqs} requests and {config.max_graph_tokens} tokens",
            "lower max_graph_tokens, max_num_seqs or memory_fraction",
        ):
            parts = cuda_parts(config, model, pages, kv_cache, info, attention)
        return replace(parts, page_bytes=page_bytes(model.config, model.dtype))
    site_bytes = page_bytes(model.config, model.dtype)
    memory = HostMemory(_cpu_host_bytes(config, num_pages, site_bytes), pin=False)
    usual_bytes = sum(site_bytes)
    tier: HostTier[LoadedAdapter] = HostTier(
        lambda path, zeros: load_adapter(
            path, model.config, model.dtype, zeros, base=model.base_weight, native=native
        ),
        memory,
        lambda loaded: 0 if loaded.extras is None else loaded.extras.size_bytes,
    )
    return EngineParts(
        runner=cpu_runner(native, model, pages, kv_cache, config.max_num_seqs),
        model_info=info,
        num_blocks=num_blocks,
        pool=PagePool(num_pages),
        load_adapter=tier.load,
        write_adapter=pages.write,
        num_load_threads=max(1, min(4, (os.cpu_count() or 1) // 2)),
        cached_adapter=tier.cached,
        is_in_memory=tier.__contains__,
        host_stats=tier.stats,
        max_staged=max(MAX_STAGED, int(memory.num_bytes * STAGED_SHARE / usual_bytes)),
        page_bytes=site_bytes,
    )


def _make_linear(config: EngineConfig, device: str, native: NativeKernels | None) -> MakeLinear:
    """What the model's linears are made of."""
    if config.deterministic:
        # Not at the top, as for the parts on CUDA.
        from openlora.kernels.triton_invariant_linear import InvariantLinear, SplitScratch

        return partial(InvariantLinear, SplitScratch(torch.device(device)))
    from openlora.engine.cpu_kernels import make_linear_for

    return make_linear_for(native)


def _configured(
    config: EngineConfig, device: str, dtype: str, model_config: ModelConfig
) -> ModelConfig:
    """The model as these settings serve it; refused, before it is loaded, where they cannot."""
    from openlora.models.load import DTYPES
    from openlora.models.weights import weight_shapes

    if config.max_model_len is not None:
        if config.max_model_len > model_config.max_model_len:
            raise SetupError(
                f"max_model_len is {config.max_model_len}, but the model's own limit is "
                f"{model_config.max_model_len}"
            )
        model_config = model_config.limited_to(config.max_model_len)
    torch_dtype = DTYPES[model_config.dtype if dtype == "auto" else dtype]
    if device == "cuda":
        attention_for(config, model_config, torch_dtype)
    num_weights = sum(math.prod(shape) for shape in weight_shapes(model_config).values())
    check_weights(config, device, num_weights * torch_dtype.itemsize, _usable_bytes(config, device))
    return model_config


def _model_info(config: EngineConfig, model: Any, num_pages: tuple[int, ...]) -> ModelInfo:
    return ModelInfo(
        model=config.model,
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        num_layers=model.config.num_layers,
        max_model_len=model.config.max_model_len,
        max_lora_rank=min(num_pages) * PAGE_RANK,
        eos_token_ids=tuple(model.config.eos_token_ids),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        attention_backend=model.attention_backend,
    )


def _cpu_host_bytes(
    config: EngineConfig, num_pages: Sequence[int], site_bytes: Sequence[int]
) -> int:
    if config.adapter_host_bytes is not None:
        return config.adapter_host_bytes
    if not any(num_pages):
        return 0
    # Requests take turns only where all adapters that are hot stay in host memory meanwhile.
    in_pages = sum(n * size for n, size in zip(num_pages, site_bytes, strict=True))
    wanted = int(MOST_OVER / STAGED_SHARE * in_pages)
    return min(max(_CPU_HOST_BYTES, wanted), available_memory() // _CPU_HOST_SHARE)


def _usable_bytes(config: EngineConfig, device: str) -> int:
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        free = total = available_memory()
    return usable_bytes(config, device, free, total)


@contextmanager
def _named_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """An allocation that fails nevertheless is an error of the settings.

    Raises:
        SetupError: with what did not fit, and what to do.
    """
    try:
        yield
    except RuntimeError as error:
        # On a CPU torch has no class of its own for it.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise SetupError(
            f"{what} do not fit into memory ({str(error).splitlines()[0]}); {remedy}"
        ) from error
