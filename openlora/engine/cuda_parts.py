"""The parts of an engine on a CUDA GPU: graphs, steps ahead, adapters in pinned host memory."""

from __future__ import annotations

import os

from openlora.adapters.loader import LoadedAdapter, load_adapter
from openlora.adapters.page_tensors import PageTensors, page_bytes
from openlora.adapters.pages import PagePool
from openlora.engine.adapter_supply import MAX_STAGED
from openlora.engine.attention_backends import AttentionChoice
from openlora.engine.build import STAGED_SHARE, EngineParts
from openlora.engine.config import EngineConfig
from openlora.engine.cpu_kernels import loading_kernels
from openlora.engine.cuda_runner import CudaRunner
from openlora.engine.host_memory import available_memory
from openlora.engine.host_tier import HostMemory, HostTier
from openlora.engine.kernel_check import check_kernels
from openlora.engine.kv_cache import KVCache
from openlora.engine.page_uploads import PageUploads
from openlora.engine.stats import ModelInfo
from openlora.models.decoder import Decoder

_DEFAULT_HOST_BYTES = 8 << 30
_DEFAULT_HOST_SHARE = 8
"""Of the memory that is free, so much at most."""


def cuda_parts(
    config: EngineConfig,
    model: Decoder,
    pages: PageTensors,
    kv_cache: KVCache,
    info: ModelInfo,
    attention: AttentionChoice,
) -> EngineParts:
    """The parts around a loaded model and its pools.

    Raises:
        SetupError: a kernel, or the library that is to compute attention, does not run on this GPU.
    """
    num_pages = tuple(site.a.shape[0] for site in pages.sites)
    max_graph_tokens = min(config.max_graph_tokens, config.max_num_batched_tokens)
    check_kernels(
        model.config,
        model.dtype,
        lora=any(num_pages),
        block_size=kv_cache.block_size,
        max_num_seqs=config.max_num_seqs,
        max_graph_tokens=max_graph_tokens,
        max_model_len=info.max_model_len,
        deterministic=config.deterministic,
    )
    uploads = PageUploads(pages, model.device)
    native = loading_kernels()
    memory = HostMemory(_host_bytes(config, num_pages), pin=True)
    tier: HostTier[LoadedAdapter] = HostTier(
        lambda path, zeros: load_adapter(
            path, model.config, model.dtype, zeros, base=model.base_weight, native=native
        ),
        memory,
        lambda loaded: 0 if loaded.extras is None else loaded.extras.size_bytes,
    )
    usual_bytes = sum(page_bytes(model.config, model.dtype))
    runner = CudaRunner(
        model,
        pages,
        kv_cache,
        uploads,
        max_num_seqs=config.max_num_seqs,
        max_graph_tokens=max_graph_tokens,
        max_model_len=info.max_model_len,
        attention=attention,
        deterministic=config.deterministic,
    )
    return EngineParts(
        runner=runner,
        model_info=info,
        num_blocks=kv_cache.num_blocks,
        pool=PagePool(num_pages),
        load_adapter=tier.load,
        write_adapter=uploads.write,
        steps_ahead=1,
        num_load_threads=max(1, min(12, (os.cpu_count() or 1) * 3 // 4)),
        cached_adapter=tier.cached,
        is_in_memory=tier.__contains__,
        host_stats=tier.stats,
        step_sizes=runner.step_sizes,
        max_staged=max(MAX_STAGED, int(memory.num_bytes * STAGED_SHARE / usual_bytes)),
    )


def _host_bytes(config: EngineConfig, num_pages: tuple[int, ...]) -> int:
    if config.adapter_host_bytes is not None:
        return config.adapter_host_bytes
    if not any(num_pages):
        return 0
    return min(_DEFAULT_HOST_BYTES, available_memory() // _DEFAULT_HOST_SHARE)
