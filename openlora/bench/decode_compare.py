"""``bench decode --model``: this engine beside transformers and PEFT, in one run on one machine."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from openlora.adapters.lora_set import PAGE_RANK
from openlora.bench.measure import (
    BatchTimes,
    RowWriter,
    make_requests,
    read_bytes_per_s,
    run_batch,
)
from openlora.bench.random_adapters import adapter_bytes, write_adapter
from openlora.engine import Engine, EngineConfig, Request
from openlora.engine.build import choose_device
from openlora.errors import SetupError
from openlora.models.config import ModelConfig, read_config
from openlora.models.load import DTYPES
from openlora.models.weights import weight_shapes

if TYPE_CHECKING:
    from openlora.bench.decode_peers import Peers

_BLOCK_SIZE = 16
_REPEATS = 3
"""Each case counts with its best run: what else the machine does only ever slows one down."""

_WARM_TOKENS = 2
"""Output of the run before the timed ones, which fills caches and makes each library's plans."""


@dataclass(frozen=True, slots=True)
class Case:
    """``batch`` requests over ``distinct`` adapters; 0: the base model."""

    batch: int
    distinct: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What all systems of the run share. ``dtypes`` are measured one beside the other."""

    model: Path
    config: ModelConfig
    adapters: tuple[Path, ...]
    device: str
    dtypes: tuple[str, ...]
    prompt: int
    output: int
    seed: int

    def requests(self, case: Case, output: int) -> list[Request]:
        """The same prompts and adapters for every system."""
        return make_requests(
            case.batch,
            [path.name for path in self.adapters[: case.distinct]],
            prompt_tokens=self.prompt,
            output_tokens=output,
            vocab_size=self.config.vocab_size,
            seed=self.seed,
        )


@dataclass(slots=True)
class Speed:
    """Best of a system's runs of one case, output tokens per second of the whole batch.

    ``total``: all tokens, by the time from submission to the last of them. ``decode``: without
    the prompts; tokens behind the first, by the time behind the first.
    """

    total: float = 0.0
    decode: float = 0.0

    def take(self, times: BatchTimes, batch: int, output: int) -> None:
        """Count one run."""
        self.total = max(self.total, batch * output / times.total_s)
        self.decode = max(self.decode, batch * (output - 1) / (times.total_s - times.first_s))


System = tuple[str, str]
"""("openlora" or "peers", dtype)."""

Speeds = dict[tuple[System, Case], Speed]


def compare(args: argparse.Namespace) -> None:
    """Measure all cases on all systems; a row of results each, after one of the memory's speed.

    On CPU without ``--dtype`` both fp32 and bf16 are measured. A row in bf16 is held against the
    peers in whichever dtype serves them better.

    Raises:
        SetupError: the model is no directory, no case is left to run, or one token is no decode.
    """
    cases = _cases(args)
    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as folder:
        setting = _setting(args, Path(folder), max(case.distinct for case in cases))
        bandwidth, speeds = _measure(setting, cases, args.rank)
    rows = RowWriter(args.out)
    rows.write(
        {
            "case": "memory",
            "device": setting.device,
            "threads": torch.get_num_threads(),
            "read_gb_s": bandwidth / 1e9,
        }
    )
    for dtype in setting.dtypes:
        for case in cases:
            rows.write(_row(setting, case, dtype, args.rank, bandwidth, speeds))


def _measure(setting: Setting, cases: Sequence[Case], rank: int) -> tuple[float, Speeds]:
    """Memory's bytes/s and every system's speed in every case."""
    # Heavy, and of no use to the benchmark's other modes.
    from openlora.bench.decode_peers import Peers

    batch = max(case.batch for case in cases)
    ours = {d: _engine(setting, d, batch, rank) for d in setting.dtypes}
    peers: dict[str, Peers] = {
        d: Peers(setting.model, setting.adapters, DTYPES[d], setting.device) for d in setting.dtypes
    }
    runs: dict[System, Callable[[Sequence[Request]], BatchTimes]] = {}
    for dtype in setting.dtypes:
        runs["openlora", dtype] = partial(run_batch, ours[dtype])
        runs["peers", dtype] = peers[dtype].run
    speeds: Speeds = {(system, case): Speed() for system in runs for case in cases}
    bandwidth = 0.0
    for case in cases:
        for run in runs.values():
            run(setting.requests(case, _WARM_TOKENS))
        # In turns, so that what else the machine does meets all of them alike.
        for _ in range(_REPEATS):
            bandwidth = max(bandwidth, read_bytes_per_s(torch.device(setting.device)))
            for system, run in runs.items():
                times = run(setting.requests(case, setting.output))
                speeds[system, case].take(times, case.batch, setting.output)
        _say(case, runs, speeds)
    for engine in ours.values():
        engine.close()
    return bandwidth, speeds


def _row(
    setting: Setting, case: Case, dtype: str, rank: int, bandwidth: float, speeds: Speeds
) -> dict[str, object]:
    ours = speeds[("openlora", dtype), case]
    candidates = {d: speeds[("peers", d), case] for d in setting.dtypes if d in ("float32", dtype)}
    peers_dtype = max(candidates, key=lambda d: candidates[d].decode)
    peers = candidates[peers_dtype]
    width = DTYPES[dtype].itemsize
    step_bytes = _weight_bytes(setting.config, width)
    step_bytes += case.distinct * adapter_bytes(setting.config, rank, width)
    limit = case.batch * bandwidth / step_bytes
    return {
        "case": "compare",
        "batch": case.batch,
        "distinct": case.distinct,
        "dtype": dtype,
        "rank": rank,
        "prompt": setting.prompt,
        "output": setting.output,
        "decode_tok_s": ours.decode,
        "total_tok_s": ours.total,
        "peers": "PEFT" if case.distinct else "transformers",
        "peers_dtype": peers_dtype,
        "peers_decode_tok_s": peers.decode,
        "peers_total_tok_s": peers.total,
        "decode_ratio": ours.decode / peers.decode,
        "total_ratio": ours.total / peers.total,
        "read_limit_tok_s": limit,
        "decode_share_of_read_limit": ours.decode / limit,
    }


def _weight_bytes(config: ModelConfig, width: int) -> int:
    """Bytes of the base model that a step reads; a tied embedding is one tensor, the head."""
    elements = sum(torch.Size(shape).numel() for shape in weight_shapes(config).values())
    if not config.tie_word_embeddings:
        elements -= config.vocab_size * config.hidden_size
    return elements * width


def _cases(args: argparse.Namespace) -> list[Case]:
    """Every batch with every number of adapters that it can hold."""
    batches = args.batch or (1, 8)
    distinct = args.distinct if args.distinct is not None else (0, 1, 8)
    cases = [Case(b, d) for b in batches for d in distinct if d <= b]
    if not cases or min(batches) < 1:
        raise SetupError(
            f"batches {batches} cannot hold {distinct} adapters; a batch is at least 1 and at "
            "least its number of adapters"
        )
    return cases


def _setting(args: argparse.Namespace, folder: Path, num_adapters: int) -> Setting:
    output = args.output or 48
    if output < 2:
        raise SetupError(f"output is {output}; decode is timed behind the first token, so ≥ 2")
    model = model_directory(args.model)
    config = read_config(model)
    device = choose_device(args.device)
    adapters = tuple(
        write_adapter(
            folder / f"adapter-{number}",
            config,
            rank=args.rank,
            seed=args.seed + number,
            dtype=torch.float32,
        )
        for number in range(num_adapters)
    )
    dtypes = _dtypes(args.dtype, device, config)
    return Setting(model, config, adapters, device, dtypes, args.prompt or 64, output, args.seed)


def _dtypes(dtype: str, device: str, config: ModelConfig) -> tuple[str, ...]:
    if dtype != "auto":
        return (dtype,)
    return ("float32", "bfloat16") if device == "cpu" else (config.dtype,)


def model_directory(name: str) -> Path:
    if name == "demo":
        from openlora.commands.config import cache_dir, process_environment
        from openlora.demo.model import ensure_demo_model

        return ensure_demo_model(
            cache_dir(process_environment()),
            lambda stage, _: print(f"demo model: {stage}", file=sys.stderr),
        )
    path = Path(name)
    if not (path / "config.json").is_file():
        raise SetupError(f"model is {name!r}; it must be demo or a directory with a config.json")
    return path


def _engine(setting: Setting, dtype: str, max_num_seqs: int, rank: int) -> Engine:
    """This engine with all adapters resident, and no memory beyond what the cases need."""
    pages = len(setting.adapters) * -(-rank // PAGE_RANK)
    tokens = setting.prompt + setting.output + 1
    engine = Engine(
        EngineConfig(
            model=str(setting.model),
            device=setting.device,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            num_kv_blocks=max_num_seqs * -(-tokens // _BLOCK_SIZE),
            block_size=_BLOCK_SIZE,
            adapter_pages=(pages, pages, pages, pages),
            enable_prefix_caching=False,
        )
    )
    for path in setting.adapters:
        engine.load_adapter(path.name, path)
    return engine


def _say(case: Case, systems: Iterable[System], speeds: Speeds) -> None:
    """Progress for whoever waits: a run takes minutes on a CPU."""
    told = (f"{name} {dtype} {speeds[(name, dtype), case].decode:.1f}" for name, dtype in systems)
    print(
        f"batch {case.batch}, {case.distinct} adapters, decode tok/s: {', '.join(told)}",
        file=sys.stderr,
    )
