"""Batch and interactive work on one system: what each costs the other.

Three runs on the same model and machine:
  engine       the batch's lines on the bare engine, all known at once: the limit
  batch        the same lines as a batch through a whole `openlora up`, nothing else to do, from
               the upload of the file to the last result
  interactive  requests one after the other, first on the empty system, then while a batch runs

Goals: a batch alone reaches 95 % of the bare engine; with a batch running, the first token comes
at most one engine step later than on the empty system at p50, and two at p99.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from openlora.bench.mixed_load import Client, Workload
from openlora.bench.mixed_system import running_system, shares

GOAL_SHARE = 0.95
CHAT_TOKENS = 8
CHAT_PAUSE_S = 0.2


class MixedRow(msgspec.Struct, frozen=True):
    """One line of ``--out``. ``batch_cores``: what each process took during the batch alone."""

    model: str
    device: str
    cores: int
    lines: int
    tokens: int
    engine_tok_s: float
    batch_tok_s: float
    share_of_engine: float
    first_empty_p50_ms: float
    first_empty_p99_ms: float
    first_batch_p50_ms: float
    first_batch_p99_ms: float
    step_ms: float
    batch_cores: dict[str, float]
    case: str = "mixed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--model", metavar="M", help="model directory; default: the demo model")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--lines", type=int, default=512, help="lines of the batch")
    parser.add_argument("--tokens", type=int, default=32, help="tokens for each of them")
    parser.add_argument("--requests", type=int, default=40, help="interactive requests of a run")
    parser.add_argument("--out", metavar="FILE", help="append the result as one JSON line")


def run(args: argparse.Namespace) -> int:
    """Run all of it and print a table; returns the exit status."""
    from openlora.commands.config import cache_dir, process_environment
    from openlora.demo.adapters import demo_adapters
    from openlora.demo.model import ensure_demo_model

    dirs = [] if args.model else demo_adapters()
    model = args.model or str(ensure_demo_model(cache_dir(process_environment())))
    load = Workload(args.lines, args.tokens, tuple(path.name for path in dirs))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        engine_tok_s = pool.submit(run_engine, model, args.device, load, dirs).result()
    with (
        tempfile.TemporaryDirectory(prefix="openlora-bench-") as name,
        running_system(Path(name), args.model, args.device) as system,
    ):
        client = Client(system.url)
        client.run_batch(Workload(8, 8, load.adapters).batch_file())  # loads the adapters
        before = system.cpu_seconds()
        batch, seconds = client.run_batch(load.batch_file())
        cores = shares(before, system.cpu_seconds(), seconds)
        batch_tok_s = batch["progress"]["completion_tokens"] / seconds
        client.ask(3, CHAT_TOKENS, 0)
        empty = client.ask(args.requests, CHAT_TOKENS, CHAT_PAUSE_S)
        long = Workload(args.lines * 8, args.tokens, load.adapters)
        batch_id = client.submit(long.batch_file())
        client.wait_for_tokens(batch_id, args.tokens)
        busy = client.ask(args.requests, CHAT_TOKENS, CHAT_PAUSE_S)
        client.cancel(batch_id)
        client.close()
    row = MixedRow(
        model=Path(model).name,
        device=args.device,
        cores=os.cpu_count() or 1,
        lines=args.lines,
        tokens=args.tokens,
        engine_tok_s=round(engine_tok_s, 1),
        batch_tok_s=round(batch_tok_s, 1),
        share_of_engine=round(batch_tok_s / engine_tok_s, 3),
        first_empty_p50_ms=round(empty.first(50), 1),
        first_empty_p99_ms=round(empty.first(99), 1),
        first_batch_p50_ms=round(busy.first(50), 1),
        first_batch_p99_ms=round(busy.first(99), 1),
        step_ms=round(busy.step_ms, 1),
        batch_cores=cores,
    )
    print_table(row)
    if args.out:
        with Path(args.out).open("ab") as out:
            out.write(msgspec.json.encode(row) + b"\n")
    return 0


def run_engine(model: str, device: str, load: Workload, adapters: list[Path]) -> float:
    """Tokens per second of the bare engine over the batch's lines. Runs in a process of its own,
    so that its memory is free again."""
    from openlora.engine import Engine, EngineConfig, Request, SamplingParams
    from workers.tokenizer import PromptTokenizer

    engine = Engine(EngineConfig(model=model, device=device))
    for path in adapters:
        engine.load_adapter(path.name, str(path))
    tokenizer = PromptTokenizer(model)

    def requests(lines: int, tokens: int) -> list[Request]:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        found = []
        for number in range(lines):
            ids = tokenizer.backend.encode(load.prompt(number)).ids
            adapter = load.adapter(number)
            found.append(Request(ids, {adapter: 1.0} if adapter else {}, params))
        return found

    engine.generate(requests(8, 8))
    began = time.perf_counter()
    completions = engine.generate(requests(load.lines, load.tokens))
    return sum(len(done.token_ids) for done in completions) / (time.perf_counter() - began)


def print_table(row: MixedRow) -> None:
    """What was measured beside what is aimed at."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "measured", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("bare engine, tok/s", f"{row.engine_tok_s:,.0f}", "")
    table.add_row("batch through the system, tok/s", f"{row.batch_tok_s:,.0f}", "")
    table.add_row("share of the engine", f"{row.share_of_engine:.0%}", f"≥ {GOAL_SHARE:.0%}")
    table.add_row("engine step beside a batch, ms", f"{row.step_ms:,.0f}", "")
    for role, cores in row.batch_cores.items():
        table.add_row(f"{role} during the batch, cores", f"{cores:.2f}", "")
    for name, empty, busy, steps in (
        ("p50", row.first_empty_p50_ms, row.first_batch_p50_ms, 1),
        ("p99", row.first_empty_p99_ms, row.first_batch_p99_ms, 2),
    ):
        table.add_row(f"first token {name}, empty system, ms", f"{empty:,.0f}", "")
        goal = f"≤ {empty + steps * row.step_ms:,.0f}"
        table.add_row(f"first token {name}, beside a batch, ms", f"{busy:,.0f}", goal)
    Console(highlight=False).print(table)
