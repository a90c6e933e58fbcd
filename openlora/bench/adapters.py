"""Throughput and time to the first token over many adapters, more of them than fit into pages.

examples:
  openlora bench adapters                                        the demo model on CPU
  openlora bench adapters --adapters 8,64,2000 --popularity zipf,distinct --rank mixed --room 16
  python -m openlora.bench adapters --shape 8b --device cuda --adapters 64,2000

A fixed number of requests (--concurrency) is kept under way, of which --seats run at a time; each
takes its adapter as the popularity says: "distinct" one after the other, "uniform" and "zipf"
(1.0) drawn, "identical" always the first. With --apart N no adapter is taken again by the N
requests behind one with it, so that steps have as many different adapters however many there are.
Answers have half to one and a half times --output tokens.

--room adapters of the case's rank fit into pages, --host-mib keeps some more in host memory,
--disk-mib on disk. All others are in a store that makes an adapter's bytes from --seed and its
number whenever it is asked for: they take no room. At the start the disk has what fits of those
drawn most. With --rounds all cases of a rank run in turns, so that what else the machine does meets
all; after --limit-s no further case begins. One JSON row a case, as soon as its last round is over:

  {"case":"adapters","model":"demo","adapters":64,"popularity":"zipf","rank":"16","room":16,
   "distinct":31,"distinct_a_step":6.1,"out_tok_s":…,"ttft_p50_ms":…,"ttft_p99_ms":…,"placed":…,
   "read":…,"fetched":…,"of_all_fit":…,"ttft_of_all_fit":…}

placed: loads into pages; read: from disk into host memory; fetched: from the store. of_all_fit,
ttft_of_all_fit: out_tok_s and ttft_p50_ms as shares of the case's in which everything fits, where
that case ran.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from openlora.adapters.lora_set import PAGE_RANK
from openlora.bench.adapter_traffic import (
    POPULARITIES,
    Outcome,
    Plan,
    measure,
    plan_of,
    staggered,
    together,
    warm_up,
)
from openlora.bench.decode_compare import model_directory
from openlora.bench.measure import RowWriter, about_machine, make_requests
from openlora.bench.synthetic_adapters import SyntheticAdapters, on_disk
from openlora.engine import Engine, EngineConfig, Request
from openlora.engine.build import choose_device
from openlora.errors import SetupError
from openlora.models.config import ModelConfig, read_config
from openlora.models.dummy import DUMMY_CONFIGS
from openlora.models.load import DTYPES

MIXED = (8, 16, 64)
_BLOCK_SIZE = 16
_PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}
_SWITCH_INTERVAL_S = 0.0005
_USUAL = {
    "room": (16, 64, "adapters that fit into pages"),
    "concurrency": (8, 96, "requests under way"),
    "seats": (8, 64, "requests that run at a time, at most --concurrency"),
    "prompt": (32, 128, "tokens of a prompt"),
    "output": (16, 128, "tokens of an answer"),
    "requests": (64, 192, "of a case, in each round"),
}
"""Flag → its default with --model, that with --shape, what it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench adapters``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="demo", metavar="M", help="demo (default), or a folder")
    what.add_argument("--shape", choices=tuple(DUMMY_CONFIGS), help="random weights of that shape")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--adapters", default="1,8,64", metavar="N,…", help="default 1,8,64")
    parser.add_argument(
        "--popularity", default="zipf", metavar="P,…", help=f"of {', '.join(POPULARITIES)}"
    )
    parser.add_argument("--rank", default="16", metavar="R,…", help="numbers, or mixed")
    for name, (of_model, of_shape, text) in _USUAL.items():
        text += f" (default {of_model}, with --shape {of_shape})"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument("--apart", type=int, default=0, metavar="N", help="see above (default 0)")
    parser.add_argument("--host-mib", type=int, metavar="N", help="default: as the engine decides")
    parser.add_argument("--disk-mib", type=int, default=8192, metavar="N", help="default 8192")
    parser.add_argument("--rounds", type=int, default=1, help="cases in turns (default 1)")
    parser.add_argument("--limit-s", type=float, metavar="S", help="default: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the rows to it")


def run(args: argparse.Namespace) -> int:
    """Run all cases; the exit status."""
    started_s = time.monotonic()
    counts = [_number(text) for text in args.adapters.split(",")]
    popularities = args.popularity.split(",")
    for popularity in popularities:
        if popularity not in POPULARITIES:
            raise SetupError(f"popularity is {popularity!r}; use some of {', '.join(POPULARITIES)}")
    for name, (of_model, of_shape, _) in _USUAL.items():
        if getattr(args, name) is None:
            setattr(args, name, of_shape if args.shape else of_model)
    for name in (*_USUAL, "rounds", "disk_mib"):
        if getattr(args, name) < 1:
            raise SetupError(f"{name} is {getattr(args, name)}; it must be at least 1")
    args.seats = min(args.seats, args.concurrency)
    # As in a worker: the threads that load adapters keep the engine's waiting for no longer.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    rows = RowWriter(args.out, about_machine(choose_device(args.device)))
    model = None if args.shape else model_directory(args.model)
    # A popularity's cases one behind the other, those that all fit first: the others' measure.
    cases = [(count, popularity) for popularity in popularities for count in sorted(counts)]
    plan = plan_of(cases, args.rounds, args.requests, args.seed, args.apart)
    for rank in args.rank.split(","):
        ranks = MIXED if rank == "mixed" else (_number(rank),)
        with tempfile.TemporaryDirectory(prefix="openlora-bench-") as folder:
            until_s = None if args.limit_s is None else started_s + args.limit_s
            found = _outcomes(args, model, Path(folder), ranks, plan, until_s)
            _write_rows(args, rank, plan, found, rows)
    return 0


def _outcomes(
    args: argparse.Namespace,
    model: Path | None,
    folder: Path,
    ranks: Sequence[int],
    plan: Plan,
    until_s: float | None,
) -> Iterator[tuple[tuple[int, str], list[Outcome]]]:
    """Each case, when its last round is over, with what its requests saw, round by round.

    ``ranks``: of the adapters. ``until_s``: on the monotonic clock; no case begins behind it.
    """
    config = DUMMY_CONFIGS[args.shape] if model is None else read_config(model)
    source = SyntheticAdapters(config, ranks, args.seed, _dtype(args, config))
    drawn = [number for by_case in plan for numbers in by_case.values() for number in numbers]
    paths = on_disk(folder, source, drawn, args.disk_mib << 20)
    engine = _engine(args, model, folder, source, ranks)
    for number in range(max(count for count, _ in plan[0])):
        # What nobody draws has no content: it is a name among the others.
        engine.register_adapter(_name(number), paths.get(number, folder / _name(number)))
    names = [_name(number) for number in sorted(paths)[: min(args.room, args.seats)]]
    warm_up(engine, args.seats, args.prompt, names)
    outcomes: dict[tuple[int, str], list[Outcome]] = {case: [] for case in plan[0]}
    turns = [(number, case) for number in range(len(plan)) for case in plan[number]]
    for turn, (number, case) in enumerate(turns, 1):
        of_all = f"{turn} of {len(turns)}, round {number}, {case[0]} {case[1]}"
        began_s = time.monotonic()
        if until_s is not None and began_s > until_s:
            print(f"{of_all}: left out, --limit-s is over", file=sys.stderr)
        else:
            requests = _requests(args, engine, plan[number][case], args.seed + number)
            outcomes[case].append(measure(engine, requests, args.concurrency))
            speed, seconds = outcomes[case][-1].out_tok_s, time.monotonic() - began_s
            print(f"{of_all}: {speed:.1f} tok/s, {seconds:.1f} s", file=sys.stderr, flush=True)
        if number == len(plan) - 1 and outcomes[case]:
            yield case, outcomes[case]
    engine.close()


def _write_rows(
    args: argparse.Namespace,
    rank: str,
    plan: Plan,
    outcomes: Iterable[tuple[tuple[int, str], list[Outcome]]],
    rows: RowWriter,
) -> None:
    all_fit: dict[str, Outcome] = {}
    for case, found in outcomes:
        outcome = together(found)
        if case[0] <= args.room:
            all_fit[case[1]] = outcome
        distinct = {number for drawn in plan[: len(found)] for number in drawn[case]}
        rows.write(_row(args, rank, case, len(distinct), len(found), outcome, all_fit))


def _row(
    args: argparse.Namespace,
    rank: str,
    case: tuple[int, str],
    distinct: int,
    rounds: int,
    outcome: Outcome,
    all_fit: dict[str, Outcome],
) -> dict[str, object]:
    row: dict[str, object] = {
        "case": "adapters",
        "model": args.shape or args.model,
        "adapters": case[0],
        "popularity": case[1],
        "rank": rank,
        "room": args.room,
        "requests": args.requests * rounds,
        "concurrency": args.concurrency,
        "seats": args.seats,
        "prompt": args.prompt,
        "output": args.output,
        "apart": args.apart,
        "distinct": distinct,
        "distinct_a_step": outcome.distinct_a_step,
        "out_tok_s": outcome.out_tok_s,
        "ttft_p50_ms": outcome.ttft_ms(0.5),
        "ttft_p99_ms": outcome.ttft_ms(0.99),
        "placed": outcome.placed,
        "read": outcome.read,
        "fetched": outcome.fetched,
    }
    fitting = all_fit.get(case[1])
    if fitting is not None:
        row["of_all_fit"] = outcome.out_tok_s / fitting.out_tok_s
        row["ttft_of_all_fit"] = outcome.ttft_ms(0.5) / fitting.ttft_ms(0.5)
    return row


def _engine(
    args: argparse.Namespace,
    model: Path | None,
    folder: Path,
    source: SyntheticAdapters,
    ranks: Sequence[int],
) -> Engine:
    pages = round(args.room * sum(-(-r // PAGE_RANK) for r in ranks) / len(ranks))
    pages = max(pages, -(-max(ranks) // PAGE_RANK))
    longest = max(args.prompt + args.output + args.output // 2, args.prompt + 1 + args.seats)
    blocks = -(-(longest + 1) // _BLOCK_SIZE)
    return Engine(
        EngineConfig(
            model=args.shape if model is None else str(model),
            load_format="dummy" if model is None else "auto",
            device=args.device,
            dtype=args.dtype,
            block_size=_BLOCK_SIZE,
            num_kv_blocks=args.seats * blocks,
            adapter_pages=(pages,) * 4,
            adapter_host_bytes=None if args.host_mib is None else args.host_mib << 20,
            adapter_disk_dir=str(folder),
            adapter_disk_bytes=args.disk_mib << 20,
            max_num_seqs=args.seats,
            max_num_batched_tokens=max(args.seats, _PREFILL_TOKENS[choose_device(args.device)]),
            enable_prefix_caching=False,
        ),
        adapter_source=source,
    )


def _dtype(args: argparse.Namespace, config: ModelConfig) -> torch.dtype:
    """Of the pages, as the engine chooses it, so that files need no conversion."""
    own = "float32" if choose_device(args.device) == "cpu" else config.dtype
    return DTYPES[own if args.dtype == "auto" else args.dtype]


def _requests(
    args: argparse.Namespace, engine: Engine, drawn: Sequence[int], seed: int
) -> list[Request]:
    """One for each drawn adapter."""
    requests = make_requests(
        len(drawn),
        [_name(number) for number in drawn],
        prompt_tokens=args.prompt,
        output_tokens=args.output,
        vocab_size=engine.model_info.vocab_size,
        seed=seed,
    )
    return staggered(requests, seed)


def _name(number: int) -> str:
    return f"adapter-{number}"


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise SetupError(f"{text!r} is no whole number from 1")
    return int(text)
