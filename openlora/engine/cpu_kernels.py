"""Which kernels a model on a CPU runs on: native ones where they can be had, else torch's."""

from __future__ import annotations

import logging
from functools import partial

from openlora.adapters.page_tensors import PageTensors
from openlora.engine.kv_cache import KVCache
from openlora.engine.native_runner import NativeRunner
from openlora.engine.runner import ModelRunner
from openlora.engine.step import Runner
from openlora.errors import SetupError
from openlora.kernels.linear import Linear
from openlora.kernels.native.build import NativeUnavailable
from openlora.kernels.native.library import MAX_GROUP_DIM, Arena, NativeKernels, native_kernels
from openlora.kernels.native.linear import NativeLinear
from openlora.models.decoder import Decoder
from openlora.models.weights import MakeLinear

logger = logging.getLogger(__name__)

_DTYPES = ("float32", "bfloat16")


def native_kernels_for(setting: str, device: str, dtype: str) -> NativeKernels | None:
    """The native kernels, or None where torch is to compute.

    Args:
        setting: ``EngineConfig.cpu_kernels``.
        device: "cpu" or "cuda".
        dtype: of the model.

    Raises:
        SetupError: the setting is "native", and they cannot be had.
    """
    if device != "cpu" or setting == "torch":
        return None
    reason = f"they compute in {' and '.join(_DTYPES)}, not in {dtype}"
    if dtype in _DTYPES:
        try:
            return native_kernels()
        except NativeUnavailable as unavailable:
            reason = str(unavailable)
    if setting == "native":
        raise SetupError(f"cpu_kernels is 'native', but there are none: {reason}")
    logger.warning("no native CPU kernels, torch computes (slower): %s", reason)
    return None


def loading_kernels() -> NativeKernels | None:
    """What fills adapter pages in host memory where a GPU computes; None: torch does, slower."""
    try:
        return native_kernels()
    except NativeUnavailable as unavailable:
        logger.warning("no native kernels, adapters are loaded by torch (slower): %s", unavailable)
        return None


def make_linear_for(native: NativeKernels | None) -> MakeLinear:
    """What the model's linears are made of."""
    return Linear if native is None else partial(NativeLinear, native, Arena())


def cpu_runner(
    native: NativeKernels | None,
    model: Decoder,
    pages: PageTensors,
    kv_cache: KVCache,
    max_num_seqs: int,
) -> Runner:
    """The runner of a model whose linears are of ``make_linear_for(native)``.

    Raises:
        SetupError: the native kernels lack something that the model needs.
    """
    if native is None:
        return ModelRunner(model, pages, kv_cache)
    config = model.config
    if config.num_heads // config.num_kv_heads * config.head_dim > MAX_GROUP_DIM:
        raise SetupError(
            f"{config.num_heads} query heads of {config.head_dim} on {config.num_kv_heads} kv "
            "heads are more than the native CPU kernels take; set cpu_kernels to 'torch'"
        )
    return NativeRunner(model, pages, kv_cache, native, max_num_seqs)
