"""Compiles all Triton kernels of a model for the GPU at hand, so that a fault ends the start."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton

from openlora.adapters.lora_set import SITES, LoRASet
from openlora.adapters.page_tensors import PageTensors
from openlora.engine.attention_binding import AttentionBinding, attention_scratch
from openlora.engine.cuda_ops import (
    CudaOps,
    LoRABinding,
    RotaryBinding,
    decode_tiles,
    scratch_elements,
)
from openlora.engine.decode_graphs import PAGES_PER_ROW, USUAL_PAGES_PER_ROW, buckets
from openlora.engine.kv_cache import KVCache
from openlora.engine.mixed_steps import MixedSteps
from openlora.engine.sgmv_plan import PlanLayout
from openlora.engine.step import RowSampling, StepRow
from openlora.errors import SetupError
from openlora.kernels.linear import Linear
from openlora.kernels.triton_compile import KernelFailed, compile_launches
from openlora.kernels.triton_invariant_linear import InvariantLinear, SplitScratch
from openlora.kernels.triton_sampling import GreedyScratch, greedy, take_tokens
from openlora.kernels.triton_sgmv import SGMVTables, SGMVTiles
from openlora.models.config import ModelConfig
from openlora.models.decoder import Decoder
from openlora.models.weights import weight_shapes
from openlora.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 on tensor cores and asynchronous copies."""
_META = torch.device("meta")
_SAMPLING = RowSampling(SamplingParams(), 0, 0, (), ())


def check_kernels(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    lora: bool,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    deterministic: bool = False,
) -> int:
    """Compile and load what an engine on the current CUDA device will launch.

    What Triton's cache on disk holds is only loaded.

    Returns:
        How many kernels these are.

    Raises:
        SetupError: names the kernel, the device and the versions, and says what to do.
    """
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        raise SetupError(
            f"{torch.cuda.get_device_name()} has compute capability {_dotted(capability)}; the "
            f"kernels need {_dotted(MIN_CAPABILITY)} or later: use another GPU, or device 'cpu'"
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    started = time.perf_counter()
    try:
        kernels = compile_kernels(
            config,
            dtype,
            lora=lora,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            num_processors=properties.multi_processor_count,
            deterministic=deterministic,
        )
        for name, variants in kernels.items():
            for kernel in variants:
                _load(name, kernel)
    except KernelFailed as failed:
        raise SetupError(kernel_message(failed)) from failed
    count = sum(map(len, kernels.values()))
    seconds = time.perf_counter() - started
    logger.info("%d Triton kernels for compute %s in %.1f s", count, _dotted(capability), seconds)
    return count


def _load(name: str, kernel: Any) -> None:
    """Onto the GPU, where it shows if shared memory is too small or no C compiler is there."""
    try:
        _ = kernel.run
    except Exception as error:
        raise KernelFailed(name, error) from error


def kernel_message(failed: KernelFailed) -> str:
    """One line for the operator, on the current CUDA device."""
    remedy = "install a Triton that fits this torch and GPU, or use device 'cpu'"
    if "compiler" in failed.reason.lower() and "find" in failed.reason.lower():
        remedy = "install gcc (Triton builds its launchers with it), or name one in CC"
    if "out of resource" in failed.reason.lower():
        remedy = "this GPU is too small for the kernel: report it, and use device 'cpu' until then"
    return (
        f"the kernel {failed.kernel} does not compile on {torch.cuda.get_device_name()} (compute "
        f"{_dotted(torch.cuda.get_device_capability())}) with torch {torch.__version__}, triton "
        f"{triton.__version__}: {failed.reason}; {remedy}"
    )


def compile_kernels(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    lora: bool,
    block_size: int = 16,
    max_num_seqs: int = 64,
    max_model_len: int | None = None,
    num_processors: int = 132,
    deterministic: bool = False,
) -> dict[str, list[Any]]:
    """Walk through the steps of an engine on tensors without memory, compiling every kernel.

    Args:
        config, dtype: the model's.
        lora: whether there are adapter pages.
        block_size, max_num_seqs, max_model_len: the engine's.
        num_processors: of the GPU.
        deterministic: of the engine.

    Returns:
        By name of the kernel, Triton's ``CompiledKernel`` of each variant.

    Raises:
        KernelFailed: from the first kernel that does not compile.
    """
    steps = MetaSteps(
        config,
        dtype,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len or config.max_model_len,
        num_processors=num_processors,
        deterministic=deterministic,
    )

    def walk() -> None:
        # All sizes that graphs are captured in: kernels of few rows are cut otherwise, and one that
        # is compiled when it is first needed stops all streams for as long as that takes.
        kinds = (None, False, True)[: 1 if not lora else 2 if deterministic else 3]
        for rows in buckets(max_num_seqs):
            for rows_share in kinds:
                steps.decode(rows, rows_share)
        sets = [LoRASet.EMPTY, *([LoRASet((((0, 1.0),),) * len(SITES), "any")] if lora else [])]
        # Linears of deterministic steps have other tiles for many tokens, and for more yet.
        for tokens in (block_size + 1, 80, 300) if deterministic else (block_size + 1,):
            for lora_set in sets:
                steps.mixed((1, tokens), lora_set)

    with torch.inference_mode():
        return compile_launches(walk, os.cpu_count() or 1)


class MetaSteps:
    """An engine's steps on tensors without memory, for ``compile_launches``; see there."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        num_processors: int,
        deterministic: bool = False,
    ) -> None:
        config = _shortened(config)
        shapes = weight_shapes(config)
        model = Decoder(
            config,
            lambda name: torch.empty(shapes[name], dtype=dtype, device=_META),
            dtype,
            _META,
            make_linear=partial(InvariantLinear, SplitScratch(_META)) if deterministic else Linear,
        )
        self._deterministic = deterministic
        pages = PageTensors(config, (1,) * len(SITES), dtype, _META)
        kv_cache = KVCache(config, 1, dtype, _META, block_size)
        self._model = model
        self._pages = [site.layers for site in pages.sites]
        self._kv_cache = kv_cache
        self._processors = num_processors
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._mixed = MixedSteps(
            model,
            pages,
            kv_cache,
            num_processors=num_processors,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            to_device=lambda array: torch.empty(array.shape, dtype=torch.int32, device=_META),
            deterministic=deterministic,
        )

    def mixed(self, counts: Sequence[int], lora_set: LoRASet) -> None:
        """Rows of ``counts`` tokens each, decodes first."""
        blocks = -(-max(counts) // self._kv_cache.block_size)
        rows = [
            StepRow(index, [0] * count, 0, [0] * blocks, lora_set, _SAMPLING)
            for index, count in enumerate(counts)
        ]
        self._mixed.logits(rows, {}, _ints(self._max_num_seqs).long())

    def decode(self, num_rows: int, rows_share: bool | None) -> None:
        """As ``DecodeGraphs`` captures it; ``rows_share`` None: without LoRA."""
        fields = _ints(5, self._max_num_seqs)[:, :num_rows]
        blocks = -(-self._max_model_len // self._kv_cache.block_size)
        config = self._model.config
        lora = None
        if rows_share is not None:
            tiles = decode_tiles(
                self._pages,
                self._processors,
                rows_share=rows_share,
                deterministic=self._deterministic,
            )
            lora = self._lora(tiles, num_rows)
        ops = CudaOps(
            config=config,
            positions=fields[2],
            slots=fields[3],
            rotary=RotaryBinding.of(self._model),
            kv_layers=self._kv_cache.layers,
            attention_binding=AttentionBinding.of_decodes(
                num_decodes=num_rows,
                block_tables=_ints(self._max_num_seqs, blocks),
                context_lens=fields[4],
                scratch=attention_scratch(
                    config,
                    num_rows,
                    num_processors=self._processors,
                    max_model_len=self._max_model_len,
                    device=_META,
                    deterministic=self._deterministic,
                ),
            ),
            lora=lora,
        )
        tokens = take_tokens(fields[0], fields[1], _ints(self._max_num_seqs).long())
        logits = self._model.logits(self._model.forward(tokens, ops), ops)
        greedy(logits, GreedyScratch(num_rows, self._processors, _META))

    def _lora(self, tiles: tuple[SGMVTiles, ...], num_rows: int) -> LoRABinding:
        layout = PlanLayout(self._max_num_seqs, self._max_num_seqs * PAGES_PER_ROW)
        h_rows = self._max_num_seqs * PAGES_PER_ROW
        return LoRABinding(
            plan=SGMVTables(
                _ints(len(SITES), layout.site_ints),
                layout.items_at,
                layout.max_chunks,
                layout.max_items,
                usual_chunks=num_rows,
                usual_items=num_rows * USUAL_PAGES_PER_ROW,
            ),
            pages=self._pages,
            h=torch.empty(scratch_elements(self._pages, tiles, h_rows), device=_META),
            h_rows=h_rows,
            tiles=tiles,
        )


def _shortened(config: ModelConfig) -> ModelConfig:
    """The first layers, as many as show every kind there is: all that follow launch the same."""
    kinds = config.sliding_layers or (False,)
    num_layers = max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
    num_layers = min(num_layers, config.num_layers)
    return replace(config, num_layers=num_layers, sliding_layers=config.sliding_layers[:num_layers])


def _ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=_META)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
