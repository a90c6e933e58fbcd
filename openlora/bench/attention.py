"""The attention backends beside each other, in the shapes that a step has.

One JSON row per case and backend, printed and appended to --out: the time of one layer's attention
within a CUDA graph over several layers (so that nothing is served from L2), the host's time to
launch it (steps with prefill run without a graph), what it reaches of the GPU, and how far its
result is from the Triton kernels'. A backend that cannot be used gets one row that says why. Needs
a CUDA GPU and the engine's packages alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openlora.bench.kernels import LAYERS, append_rows, check_gpu, graph_seconds

CASES = (
    ("prefill", 64, 128),
    ("prefill", 1, 8192),
    ("decode", 64, 256),
    ("decode", 64, 8192),
)
"""(phase, rows, context of each); a prefill's chunk is its whole context."""
HOST_CALLS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--shape", choices=("8b", "1b"), default="8b", help="model shape")
    parser.add_argument("--block-size", type=int, default=16, help="positions of a KV block")
    parser.add_argument("--out", type=Path, help="append the rows to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        SetupError: there is no CUDA GPU.
    """
    check_gpu("attention")
    rows = []
    for row in _rows(args):
        rows.append(row)
        print(json.dumps(row), flush=True)
    append_rows(args.out, rows)
    return 0


@torch.inference_mode()
def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from openlora.models.dummy import DUMMY_CONFIGS

    config = DUMMY_CONFIGS[args.shape]
    about = {
        "case": "attention",
        "model": args.shape,
        "block_size": args.block_size,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    choices = {}
    for name, choice, reason in _backends(config, args.block_size):
        if reason is None:
            choices[name] = choice
        else:
            yield {**about, "backend": name, "skipped": reason}
    for phase, rows, context in CASES:
        case = Case(config, phase, rows, context, args.block_size)
        expected = None
        for name, choice in choices.items():
            result = case.attend(case.caches[0], choice).float()
            expected = result if expected is None else expected
            seconds = graph_seconds(partial(case.all_layers, choice)) / LAYERS
            yield {
                **about,
                "backend": name,
                "phase": phase,
                "rows": rows,
                "context": context,
                "us": round(seconds * 1e6, 1),
                "host_us": round(case.host_seconds(choice) * 1e6, 1),
                case.unit: round(case.work / seconds / 1e12, 2),
                "max_difference": round(float((result - expected).abs().max()), 5),
            }
        del case, expected, result


def _backends(config: Any, block_size: int) -> Iterator[tuple[str, Any, str | None]]:
    """(name, choice, why it cannot be used) of each, the Triton kernels first."""
    from openlora.engine.attention_backends import TRITON, TRITON_ATTENTION, AttentionChoice
    from openlora.engine.attention_libraries import LIBRARIES, AttentionNeeds, LibraryBroken

    yield TRITON, TRITON_ATTENTION, None
    capability = torch.cuda.get_device_capability()
    needs = AttentionNeeds.of(config, torch.bfloat16, block_size, capability)
    for library in LIBRARIES:
        reason, choice = library.why_not(needs), TRITON_ATTENTION
        if reason is None:
            try:
                flash = library.load()
                choice = AttentionChoice(flash, flash)
            except LibraryBroken as broken:
                reason = str(broken)
        yield f"{library.name} {library.version() or ''}".strip(), choice, reason


class Case:
    """Random queries and caches of one shape.

    Attributes:
        caches: one a layer.
        work: bytes that a decode must read, or operations of a prefill; ``unit`` names their rate.
    """

    def __init__(
        self,
        config: Any,
        phase: str,
        rows: int,
        context: int,
        block_size: int,
        device: str = "cuda",
    ) -> None:
        from openlora.engine.step_inputs import query_tiles
        from openlora.kernels.flash_attention import Chunks
        from openlora.kernels.triton_attention import DecodeScratch, decode_splits
        from openlora.kernels.triton_prefill_attention import prefill_tile_tokens

        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        blocks = -(-context // block_size)
        tokens = 1 if phase == "decode" else context
        starts = np.arange(rows + 1, dtype=np.int32) * tokens
        spans = np.stack(
            [starts[:-1], np.full(rows, tokens), np.full(rows, context - tokens)], axis=1
        ).astype(np.int32)
        self._num_decodes = rows if phase == "decode" else 0
        tiles = query_tiles(spans, self._num_decodes, prefill_tile_tokens(heads, kv_heads))
        self._spans, self._tiles = (torch.from_numpy(array).to(device) for array in (spans, tiles))
        self._tables = torch.randperm(rows * blocks, device=device, dtype=torch.int32)
        self._tables = self._tables.view(rows, blocks)
        self._lens = torch.full((rows,), context, dtype=torch.int32, device=device)
        query_starts = torch.from_numpy(starts).to(device)
        context_starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * context
        self._chunks = None
        if phase == "prefill":
            self._chunks = Chunks(query_starts, self._lens, context_starts, self._tables, tokens)
        processors = 1
        if device == "cuda":
            processors = torch.cuda.get_device_properties(0).multi_processor_count
        splits = decode_splits(rows, kv_heads, processors, context)
        self._scratch = DecodeScratch(rows, heads, kv_heads, head_dim, splits, self._tables.device)
        self._scale = head_dim**-0.5
        self._q = _normal(device, rows * tokens, heads + 2 * kv_heads, head_dim)[:, :heads]
        shape = (2, rows * blocks, kv_heads, block_size, head_dim)
        self.caches = [_normal(device, *shape) for _ in range(LAYERS)]
        if phase == "decode":
            self.unit, self.work = "tb_s", rows * context * kv_heads * head_dim * 2 * 2
        else:
            self.unit, self.work = "tflop_s", 4 * rows * heads * head_dim * context * context // 2

    def attend(self, cache: torch.Tensor, choice: Any) -> torch.Tensor:
        """One layer, as the engine computes it."""
        from openlora.engine.attention_binding import AttentionBinding

        binding = AttentionBinding(
            num_decodes=self._num_decodes,
            block_tables=self._tables,
            context_lens=self._lens,
            scratch=self._scratch,
            spans=self._spans,
            tiles=self._tiles,
            chunks=self._chunks,
            choice=choice,
        )
        return binding.attend(self._q, cache, self._scale, window=0, soft_cap=0.0)

    def all_layers(self, choice: Any) -> None:
        """Each over a cache of its own."""
        for cache in self.caches:
            self.attend(cache, choice)

    def host_seconds(self, choice: Any) -> float:
        """To launch one layer, the GPU's work not waited for."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(HOST_CALLS):
            self.attend(self.caches[0], choice)
        seconds = (time.perf_counter() - started) / HOST_CALLS
        torch.cuda.synchronize()
        return seconds


def _normal(device: str, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
