"""Throughput and time to the first token over many adapters, more of them than fit into pages.

examples:
  openlora bench adapters                                        the demo model on CPU
  openlora bench adapters --adapters 8,64,2000 --popularity zipf,distinct --rank mixed --room 16

A fixed number of requests (--concurrency) is kept under way; each takes its adapter as the
popularity says: "distinct" one after the other, "uniform" and "zipf" (1.0) drawn, "identical"
always the first. With --apart N no adapter is taken again by the N requests behind one with it, so
that steps have as many different adapters however many there are. --room adapters of the case's
rank fit into pages, --host-mib keeps some more in host memory, the others are read from files.
--contents different ones are written; more adapters are links to them in directories of their own,
each read, checked and kept as if it were the only one. Answers have half to one and a half times
--output tokens. With --rounds all cases run in turns, so that what else the machine does meets all.
One JSON row a case:

  {"case":"adapters","adapters":64,"popularity":"zipf","rank":"16","room":16,"distinct":31,
   "distinct_a_step":6.1,"out_tok_s":…,"ttft_p50_ms":…,"ttft_p99_ms":…,"placed":…,"read":…,
   "of_all_fit":…,"ttft_of_all_fit":…}

placed: loads into pages; read: loads from files. of_all_fit, ttft_of_all_fit: out_tok_s and
ttft_p50_ms as shares of the case's in which everything fits, where that case ran.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from openlora.adapters.lora_set import PAGE_RANK
from openlora.bench.adapter_traffic import (
    POPULARITIES,
    Outcome,
    draw,
    link_adapter,
    measure,
    staggered,
    together,
)
from openlora.bench.decode_compare import model_directory
from openlora.bench.measure import RowWriter, about_machine, make_requests
from openlora.bench.random_adapters import write_adapter
from openlora.engine import Engine, EngineConfig, Request
from openlora.engine.build import choose_device
from openlora.errors import SetupError
from openlora.models.config import read_config

MIXED = (8, 16, 64)
_BLOCK_SIZE = 16
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench adapters``."""
    parser.add_argument("--model", default="demo", metavar="M", help="demo (default), or a folder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    parser.add_argument("--dtype", default="auto", choices=("auto", *_DTYPES))
    parser.add_argument("--adapters", default="1,8,64", metavar="N,…", help="default 1,8,64")
    parser.add_argument(
        "--popularity", default="zipf", metavar="P,…", help=f"of {', '.join(POPULARITIES)}"
    )
    parser.add_argument("--rank", default="16", metavar="R,…", help="numbers, or mixed")
    parser.add_argument("--room", type=int, default=16, help="adapters that fit (default 16)")
    parser.add_argument("--apart", type=int, default=0, metavar="N", help="see above (default 0)")
    parser.add_argument("--host-mib", type=int, metavar="N", help="default: as the engine decides")
    parser.add_argument("--contents", type=int, default=8, help="different files (default 8)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1, help="cases in turns (default 1)")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (default 32)")
    parser.add_argument("--output", type=int, default=16, help="tokens of an answer (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the rows to it")


def run(args: argparse.Namespace) -> int:
    """Run all cases; the exit status."""
    counts = [_number(text) for text in args.adapters.split(",")]
    popularities = args.popularity.split(",")
    for popularity in popularities:
        if popularity not in POPULARITIES:
            raise SetupError(f"popularity is {popularity!r}; use some of {', '.join(POPULARITIES)}")
    for name in ("room", "contents", "requests", "rounds", "concurrency", "output"):
        if getattr(args, name) < 1:
            raise SetupError(f"{name} is {getattr(args, name)}; it must be at least 1")
    rows = RowWriter(args.out, about_machine(choose_device(args.device)))
    model = model_directory(args.model)
    for rank in args.rank.split(","):
        ranks = MIXED if rank == "mixed" else (_number(rank),)
        with tempfile.TemporaryDirectory(prefix="openlora-bench-") as folder:
            _run_rank(args, model, Path(folder), rank, ranks, counts, popularities, rows)
    return 0


def _run_rank(
    args: argparse.Namespace,
    model: Path,
    folder: Path,
    rank: str,
    ranks: Sequence[int],
    counts: Sequence[int],
    popularities: Sequence[str],
    rows: RowWriter,
) -> None:
    pages = round(args.room * sum(-(-r // PAGE_RANK) for r in ranks) / len(ranks))
    engine = _engine(args, model, max(pages, -(-max(ranks) // PAGE_RANK)))
    dtype = _DTYPES[engine.model_info.dtype]
    contents = [
        write_adapter(
            folder / str(number),
            read_config(model),
            rank=ranks[number % len(ranks)],
            seed=args.seed + number,
            dtype=dtype,
        )
        for number in range(max(args.contents, len(ranks)))
    ]
    measure(engine, _requests(args, engine, [], 0, args.concurrency), args.concurrency)
    for number in range(max(counts)):
        path = contents[number] if number < len(contents) else folder / _name(number)
        if not path.exists():
            link_adapter(contents[number % len(contents)], path)
        engine.register_adapter(_name(number), path)
    cases = [(count, popularity) for count in sorted(counts) for popularity in popularities]
    drawn: dict[tuple[int, str], list[int]] = {case: [] for case in cases}
    outcomes: dict[tuple[int, str], list[Outcome]] = {case: [] for case in cases}
    for round_seed in range(args.seed, args.seed + args.rounds):
        for count, popularity in cases:
            numbers = draw(popularity, count, args.requests, round_seed, args.apart)
            drawn[count, popularity] += numbers
            requests = _requests(args, engine, numbers, round_seed)
            outcomes[count, popularity].append(measure(engine, requests, args.concurrency))
    engine.close()
    all_fit: dict[str, Outcome] = {}
    for case in cases:
        outcome = together(outcomes[case])
        if case[0] <= args.room:
            all_fit[case[1]] = outcome
        rows.write(_row(args, rank, case, len(set(drawn[case])), outcome, all_fit.get(case[1])))


def _row(
    args: argparse.Namespace,
    rank: str,
    case: tuple[int, str],
    distinct: int,
    outcome: Outcome,
    fitting: Outcome | None,
) -> dict[str, object]:
    row: dict[str, object] = {
        "case": "adapters",
        "adapters": case[0],
        "popularity": case[1],
        "rank": rank,
        "room": args.room,
        "requests": args.requests * args.rounds,
        "concurrency": args.concurrency,
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
    }
    if fitting is not None:
        row["of_all_fit"] = outcome.out_tok_s / fitting.out_tok_s
        row["ttft_of_all_fit"] = outcome.ttft_ms(0.5) / fitting.ttft_ms(0.5)
    return row


def _engine(args: argparse.Namespace, model: Path, pages: int) -> Engine:
    longest = args.prompt + args.output + args.output // 2
    blocks = -(-(longest + 1) // _BLOCK_SIZE)
    return Engine(
        EngineConfig(
            model=str(model),
            device=args.device,
            dtype=args.dtype,
            block_size=_BLOCK_SIZE,
            num_kv_blocks=args.concurrency * blocks,
            adapter_pages=(pages,) * 4,
            adapter_host_bytes=None if args.host_mib is None else args.host_mib << 20,
            max_num_seqs=args.concurrency,
            enable_prefix_caching=False,
        )
    )


def _requests(
    args: argparse.Namespace, engine: Engine, drawn: Sequence[int], seed: int, base: int = 0
) -> list[Request]:
    """One for each drawn adapter, or ``base`` without any."""
    requests = make_requests(
        len(drawn) or base,
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
