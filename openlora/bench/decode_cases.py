"""The cases of ``bench decode`` on dummy weights: batches of distinct adapters, and a zipf mix."""

from __future__ import annotations

import argparse
import gc
import os
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from openlora.adapters.lora_set import PAGE_RANK
from openlora.bench.decode_loads import measure_loads, needed_adapters
from openlora.bench.decode_profile import decode_busy
from openlora.bench.measure import (
    WARM_TOKENS,
    RowWriter,
    about_machine,
    make_requests,
    process_age_s,
    run_batch,
)
from openlora.bench.random_adapters import ALL_TARGETS, ATTENTION_TARGETS, write_adapter
from openlora.engine import Engine, EngineConfig, Request
from openlora.engine.build import choose_device
from openlora.engine.config import MAX_GRAPH_TOKENS, block_size_for
from openlora.models.dummy import DUMMY_CONFIGS
from openlora.models.load import DTYPES

_PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Most tokens of one step: a CPU gains nothing from more, a GPU needs that many to be busy."""


def decode_cases(args: argparse.Namespace, folder: Path) -> None:
    """Every batch size with every number of distinct adapters that it can hold; a row each."""
    rows = RowWriter(args.out, about_machine(choose_device(args.device)))
    engine = _started(args, rows)
    names = _adapters(args, folder, range(max(args.distinct)), engine.model_info.dtype)
    for name in names:
        engine.register_adapter(name, folder / name)
    for batch in args.batch:
        for distinct in args.distinct:
            if distinct <= batch:
                rows.write(_decode_row(args, engine, batch, names[:distinct]))
    engine.close()


def _decode_row(
    args: argparse.Namespace, engine: Engine, batch: int, adapters: list[str]
) -> dict[str, object]:
    def requests(output_tokens: int) -> list[Request]:
        return make_requests(
            batch,
            adapters,
            prompt_tokens=args.prompt,
            output_tokens=output_tokens,
            vocab_size=engine.model_info.vocab_size,
            seed=args.seed,
            ensemble=args.ensemble,
        )

    # Adapters are loaded, kernels compiled and graphs captured in a run that is not counted.
    first = run_batch(engine, requests(WARM_TOKENS))
    short = run_batch(engine, requests(WARM_TOKENS))
    long = run_batch(engine, requests(WARM_TOKENS + args.output))
    busy = {}
    if args.profile:
        busy = decode_busy(lambda: run_batch(engine, requests(WARM_TOKENS + args.output)))
    step_s = (long.total_s - short.total_s) / args.output
    return {
        "case": "decode",
        "model": args.shape,
        "rank": args.rank[0] if len(args.rank) == 1 else list(args.rank),
        "batch": batch,
        "distinct": len(adapters),
        "prompt": args.prompt,
        "output": args.output,
        "lora": args.lora,
        "gpu_adapters": args.gpu_adapters,
        "step_ms": step_s * 1e3,
        "decode_tok_s": batch / step_s,
        "ttft_batch_ms": min(short.first_s, long.first_s) * 1e3,
        "targets": args.targets,
        "ensemble": args.ensemble,
        "first_run_s": first.total_s,
        **_mode(args),
        **busy,
    }


def zipf_case(args: argparse.Namespace, folder: Path) -> None:
    """All requests at once, adapters drawn zipf(1.0) from a pool; loading is part of the time."""
    pool = range(args.zipf_pool)
    weights = [1 / (rank + 1) for rank in pool]
    drawn = random.Random(args.seed).choices(pool, weights, k=args.requests)
    rows = RowWriter(args.out, about_machine(choose_device(args.device)))
    engine = _started(args, rows)
    # Those that nobody asks for need no file.
    for name in _adapters(args, folder, sorted(set(drawn)), engine.model_info.dtype):
        engine.register_adapter(name, folder / name)
    requests = make_requests(
        args.requests,
        [_name(number) for number in drawn],
        prompt_tokens=args.prompt,
        output_tokens=args.output,
        vocab_size=engine.model_info.vocab_size,
        seed=args.seed,
    )
    warm = make_requests(
        max(args.batch),
        [],
        prompt_tokens=args.prompt,
        output_tokens=WARM_TOKENS,
        vocab_size=engine.model_info.vocab_size,
        seed=args.seed,
    )
    run_batch(engine, warm)
    seconds = run_batch(engine, requests).total_s
    engine.close()
    rows.write(
        {
            "case": "zipf",
            "requests": args.requests,
            "pool": args.zipf_pool,
            "adapters": len(set(drawn)),
            "seconds": seconds,
            "out_tok_s": args.requests * args.output / seconds,
            **_mode(args),
        }
    )


def _mode(args: argparse.Namespace) -> dict[str, object]:
    """What a row says of how the engine ran, where that is not the usual way."""
    modes: dict[str, object] = {"deterministic": True} if args.deterministic else {}
    if args.max_graph_tokens != MAX_GRAPH_TOKENS:
        modes["max_graph_tokens"] = args.max_graph_tokens
    return modes


def loads_case(args: argparse.Namespace, folder: Path) -> None:
    """Loads beside a running batch that holds all pages but one adapter's; one row."""
    rows = RowWriter(args.out, about_machine(choose_device(args.device)))
    args.batch = (args.gpu_adapters,)
    engine = _started(args, rows)
    count = needed_adapters(args.gpu_adapters)
    names = _adapters(args, folder, range(count), engine.model_info.dtype)
    for name in names:
        engine.register_adapter(name, folder / name)
    held = args.gpu_adapters - 1
    rows.write({**measure_loads(engine, args.shape, names[:held], names[held:]), **_mode(args)})
    engine.close()


def _adapters(
    args: argparse.Namespace, folder: Path, numbers: Iterable[int], dtype: str
) -> list[str]:
    """Write the adapters of these numbers under ``folder``; returns their names."""

    def write(number: int) -> str:
        directory = write_adapter(
            folder / _name(number),
            DUMMY_CONFIGS[args.shape],
            rank=args.rank[number % len(args.rank)],
            seed=args.seed + number,
            dtype=DTYPES[dtype],
            targets=ALL_TARGETS if args.targets == "all" else ATTENTION_TARGETS,
        )
        return directory.name

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(write, numbers))


def _started(args: argparse.Namespace, rows: RowWriter) -> Engine:
    """The engine of a run, and a row with the time from the start of the process until then."""
    engine = _engine(args, max(args.batch))
    if engine.model_info.device.startswith("cuda"):
        torch.cuda.synchronize()
    attention = engine.model_info.attention_backend
    started = {"case": "start", "model": args.shape, "attention": attention}
    rows.write({**started, "ready_s": process_age_s()})
    # As the worker's engine process does: what is there now need not be looked through again.
    gc.collect()
    gc.freeze()
    return engine


def _name(number: int) -> str:
    return f"adapter-{number}"


def _engine(args: argparse.Namespace, max_num_seqs: int) -> Engine:
    """An engine with exactly the adapter pages that the case names, and KV for a whole batch."""
    pages = args.gpu_adapters * -(-max(args.rank) // PAGE_RANK) if args.lora == "on" else 0
    mlp_pages = pages if args.targets == "all" else 0
    tokens = args.prompt + WARM_TOKENS + args.output + 1
    block_size = block_size_for(args.attention_backend)
    return Engine(
        EngineConfig(
            model=args.shape,
            load_format="dummy",
            device=args.device,
            dtype=args.dtype,
            block_size=block_size,
            num_kv_blocks=max_num_seqs * -(-tokens // block_size),
            adapter_pages=(pages, pages, mlp_pages, mlp_pages),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_seqs, _PREFILL_TOKENS[choose_device(args.device)]),
            enable_prefix_caching=False,
            attention_backend=args.attention_backend,
            deterministic=args.deterministic,
            max_graph_tokens=args.max_graph_tokens,
        )
    )
