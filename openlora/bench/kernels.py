"""Bandwidth of the GPU kernels that a decode step is bound by, beside a plain device copy.

One JSON row per case, printed and appended to --out: the bytes a kernel must read, its time within
a CUDA graph over several layers (so that nothing is served from L2), and the share of the copy's
bandwidth. Needs a CUDA GPU and the engine's packages alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openlora.errors import SetupError

COPY_BYTES = 1 << 30
LAYERS = 8
BLOCK_SIZE = 16
REPEATS = 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--shape", choices=("8b", "1b"), default="8b", help="model shape")
    parser.add_argument("--batch", type=int, default=64, help="rows of the step")
    parser.add_argument("--distinct", type=int, default=64, help="adapters among them")
    parser.add_argument("--context", type=int, default=256, help="cached positions of each row")
    parser.add_argument("--out", type=Path, help="append the rows to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        SetupError: there is no CUDA GPU.
    """
    check_gpu("kernels")
    rows: list[dict[str, Any]] = []
    copy = _copy_bandwidth()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    rows.append({"case": "copy", "tb_s": round(copy, 3), **about})
    print(json.dumps(rows[0]))
    for case, num_bytes, seconds in _cases(args):
        achieved = num_bytes / seconds / 1e12
        row = {
            "case": case,
            "model": args.shape,
            "batch": args.batch,
            "us": round(seconds * 1e6, 2),
            "mb": round(num_bytes / 1e6, 2),
            "tb_s": round(achieved, 3),
            "of_copy": round(achieved / copy, 3),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    append_rows(args.out, rows)
    return 0


def check_gpu(benchmark: str) -> None:
    """Raises ``SetupError`` where there is no CUDA GPU for ``bench benchmark``."""
    if not torch.cuda.is_available():
        raise SetupError(f"bench {benchmark} needs a CUDA GPU, and torch finds none")


def append_rows(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append ``rows`` as JSON lines, if a file is named."""
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def graph_seconds(step: Callable[[], object]) -> float:
    """Median time of ``step`` as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(sorted(times[2:])[REPEATS // 2]) / 1e3


def _copy_bandwidth() -> float:
    """TB/s of a device copy, bytes read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / graph_seconds(lambda: target.copy_(source)) / 1e12


def _cases(args: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    """(case, bytes it must read, seconds) of each kernel."""
    from openlora.models.dummy import DUMMY_CONFIGS

    config = DUMMY_CONFIGS[args.shape]
    yield from _matmul_cases(config, args.batch)
    yield from _sgmv_cases(config, args.batch, args.distinct)
    yield from _attention_cases(config, args.batch, args.context)


def _normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0.0, scale)


def _matmul_cases(config: Any, batch: int) -> Iterator[tuple[str, int, float]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    shapes = {
        "qkv": (q_size + 2 * kv_size, hidden),
        "o": (hidden, q_size),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    for name, (rows, columns) in shapes.items():
        weights = [_normal(rows, columns, scale=0.02) for _ in range(LAYERS)]
        matmul = partial(torch.nn.functional.linear, _normal(batch, columns))
        yield f"matmul {name}", rows * columns * 2, _seconds_a_layer(matmul, weights)


def _sgmv_cases(config: Any, batch: int, distinct: int) -> Iterator[tuple[str, int, float]]:
    from openlora.adapters.lora_set import SITES, LoRASet
    from openlora.adapters.page_tensors import SitePageTensors
    from openlora.adapters.site_shapes import site_shapes
    from openlora.engine.cuda_ops import decode_tiles
    from openlora.engine.sgmv_plan import PlanLayout, build_plan
    from openlora.kernels.triton_sgmv import SGMVTables, sgmv_shrink
    from openlora.kernels.triton_sgmv_expand import sgmv_expand

    owners = [row * distinct // batch for row in range(batch)]
    sets = [LoRASet((((owner, 1.0),),) * len(SITES), str(owner)) for owner in owners]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for site, shape in enumerate(site_shapes(config)):
        tensors = SitePageTensors(shape, distinct, LAYERS, torch.bfloat16, torch.device("cuda"))
        tensors.a.normal_(0.0, 0.02)
        tensors.b.normal_(0.0, 0.02)
        (tiles,) = decode_tiles([tensors.layers], processors, rows_share=distinct < batch)
        plan = build_plan(sets, [1] * batch, chunk_rows=tiles.chunk_rows)
        layout = PlanLayout(plan.num_chunks, plan.num_items)
        packed = torch.zeros(len(SITES), layout.site_ints, dtype=torch.int32)
        layout.fill(plan, packed.numpy())
        most = (layout.max_chunks, layout.max_items)
        tables = SGMVTables(packed.cuda(), layout.items_at, *most, *most)
        x = _normal(batch, shape.in_features)
        y = _normal(batch, len(shape.block_slices) * shape.block_out)
        h = torch.empty(tiles.splits, plan.h_rows, tensors.a.shape[-1], device="cuda")

        shrink = partial(sgmv_shrink, x, plan=tables, h=h, site=site, tiles=tiles)
        expand = partial(sgmv_expand, h, plan=tables, y=y, site=site, tiles=tiles)
        for name, kernel, pages in (("shrink", shrink, tensors.a), ("expand", expand, tensors.b)):
            num_bytes = pages.numel() * pages.element_size() // LAYERS
            layers = [pages[:, layer] for layer in range(LAYERS)]
            yield f"{name} {SITES[site]} {distinct}", num_bytes, _seconds_a_layer(kernel, layers)


def _attention_cases(config: Any, batch: int, context: int) -> Iterator[tuple[str, int, float]]:
    from openlora.kernels.triton_attention import DecodeScratch, decode_attention, decode_splits

    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(batch * blocks, device="cuda", dtype=torch.int32).view(batch, blocks)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = decode_splits(batch, kv_heads, processors, context)
    scratch = DecodeScratch(batch, heads, kv_heads, head_dim, splits, tables.device)
    attend = partial(
        decode_attention,
        _normal(batch, heads + 2 * kv_heads, head_dim)[:, :heads],
        block_tables=tables,
        context_lens=torch.full((batch,), context, dtype=torch.int32, device="cuda"),
        scale=head_dim**-0.5,
        scratch=scratch,
        out=_normal(batch, heads * head_dim),
    )
    shape = (2, batch * blocks, kv_heads, BLOCK_SIZE, head_dim)
    caches = [_normal(*shape) for _ in range(LAYERS)]
    num_bytes = batch * context * kv_heads * head_dim * 2 * 2
    yield f"attention context {context}", num_bytes, _seconds_a_layer(attend, caches)


def _seconds_a_layer(
    kernel: Callable[[torch.Tensor], object], layers: Sequence[torch.Tensor]
) -> float:
    def step() -> None:
        for layer in layers:
            kernel(layer)

    return graph_seconds(step) / len(layers)
