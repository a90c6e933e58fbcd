"""Calls libraries that compute attention once before serving, in every way that steps will."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import torch

from openlora.engine.attention_backends import AttentionChoice
from openlora.errors import SetupError
from openlora.kernels.flash_attention import Chunks, FlashAttention
from openlora.models.config import ModelConfig

logger = logging.getLogger(__name__)

_MANY_ROWS = 257
"""Rows from which flash-attn-4 has another kernel."""


def warm_attention(
    choice: AttentionChoice,
    config: ModelConfig,
    kv_layer: torch.Tensor,
    *,
    max_num_seqs: int,
    max_model_len: int,
) -> None:
    """Call the chosen libraries once in every way in which steps will.

    One that compiles its kernels does it here, not in the middle of serving or of a graph's
    capture. Reads the cache, writes nothing.

    Raises:
        SetupError: one does not run on this GPU; with what to do.
    """
    windows = sorted({config.window(layer) for layer in range(config.num_layers)})
    rows = {2, min(_MANY_ROWS, max_num_seqs)} if max_num_seqs >= _MANY_ROWS else {2}
    blocks = -(-max_model_len // kv_layer.shape[3])
    for library in {library.name: library for library in _chosen(choice)}.values():
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                for window in windows:
                    for num_rows in sorted(rows):
                        _call(library, choice, config, kv_layer, window, num_rows, blocks)
            if kv_layer.device.type == "cuda":
                torch.cuda.synchronize()
        # A library raises what it likes, its compiler's errors among them.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise SetupError(
                f"{library.name} does not run on this GPU ({lines[0]}); set attention_backend to "
                "'triton'"
            ) from error
        logger.info("%s is ready after %.1f s", library.name, time.perf_counter() - started)


def _chosen(choice: AttentionChoice) -> Iterable[FlashAttention]:
    return [library for library in (choice.prefill, choice.decode) if library is not None]


def _call(
    library: FlashAttention,
    choice: AttentionChoice,
    config: ModelConfig,
    kv_layer: torch.Tensor,
    window: int,
    num_rows: int,
    blocks: int,
) -> None:
    """Rows of two tokens each, and of one, in the cache's first block."""
    num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    device = kv_layer.device

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    qkv = kv_layer.new_zeros(2 * num_rows, num_heads + 2 * num_kv_heads, head_dim)
    q = qkv[:, :num_heads]
    tables = torch.zeros(num_rows, blocks, dtype=torch.int32, device=device)
    starts = ints(*range(0, 2 * num_rows + 1, 2))
    lens = ints(*[2] * num_rows)
    scale, soft_cap = config.attention_scale, config.attention_soft_cap
    if choice.prefill is not None and choice.prefill.name == library.name:
        chunks = Chunks(starts, lens, starts, tables, 2)
        library.prefill(q, kv_layer, chunks, scale, window=window, soft_cap=soft_cap)
    if choice.decode is not None and choice.decode.name == library.name:
        library.decode(
            q[:num_rows], kv_layer, tables, lens, scale, window=window, soft_cap=soft_cap
        )
