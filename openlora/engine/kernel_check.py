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
from openlora.engine.graph_steps import GraphSteps, LoRAKind
from openlora.engine.kv_cache import KVCache
from openlora.engine.mixed_steps import MixedSteps
from openlora.engine.step import RowSampling, StepRow
from openlora.errors import SetupError
from openlora.kernels.linear import Linear
from openlora.kernels.triton_compile import KernelFailed, compile_launches
from openlora.kernels.triton_invariant_linear import InvariantLinear, SplitScratch
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
    max_graph_tokens: int = 0,
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
            max_graph_tokens=max_graph_tokens,
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
    max_graph_tokens: int = 0,
    max_model_len: int | None = None,
    num_processors: int = 132,
    deterministic: bool = False,
) -> dict[str, list[Any]]:
    """Walk through the steps of an engine on tensors without memory, compiling every kernel.

    Args:
        config, dtype: the model's.
        lora: whether there are adapter pages.
        block_size, max_num_seqs, max_graph_tokens, max_model_len: the engine's.
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
        lora=lora,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_graph_tokens=max_graph_tokens,
        max_model_len=max_model_len or config.max_model_len,
        num_processors=num_processors,
        deterministic=deterministic,
    )

    def walk() -> None:
        # All sizes that graphs are captured in: kernels of few rows are cut otherwise, and one that
        # is compiled when it is first needed stops all streams for as long as that takes.
        for bucket, kind in steps.graph_steps.sizes():
            steps.captured(bucket, kind)
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
        lora: bool,
        block_size: int,
        max_num_seqs: int,
        max_graph_tokens: int,
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
        pages = PageTensors(config, (int(lora),) * len(SITES), dtype, _META)
        kv_cache = KVCache(config, 1, dtype, _META, block_size)
        self._block_size = block_size
        self._drawn = torch.empty(max_num_seqs, dtype=torch.int64, device=_META)
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
        self.graph_steps = GraphSteps(
            model,
            pages,
            kv_cache,
            self._drawn,
            num_processors=num_processors,
            max_rows=max_num_seqs,
            max_tokens=max_graph_tokens,
            max_model_len=max_model_len,
            deterministic=deterministic,
        )

    def mixed(self, counts: Sequence[int], lora_set: LoRASet) -> None:
        """Rows of ``counts`` tokens each, decodes first."""
        blocks = -(-max(counts) // self._block_size)
        rows = [
            StepRow(index, [0] * count, 0, [0] * blocks, lora_set, _SAMPLING)
            for index, count in enumerate(counts)
        ]
        self._mixed.logits(rows, {}, self._drawn)

    def captured(self, bucket: int, kind: LoRAKind) -> None:
        """As ``StepGraphs`` captures it."""
        steps = self.graph_steps
        steps.forward(bucket, steps.ops(bucket, kind), steps.scratch(bucket))


def _shortened(config: ModelConfig) -> ModelConfig:
    """The first layers, as many as show every kind there is: all that follow launch the same."""
    kinds = config.sliding_layers or (False,)
    num_layers = max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
    num_layers = min(num_layers, config.num_layers)
    return replace(config, num_layers=num_layers, sliding_layers=config.sliding_layers[:num_layers])


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
