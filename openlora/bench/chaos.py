"""Everything that can break, again and again, while streams run: what did their clients see?

Two gateways, two workers with a scripted engine whose tokens depend on the prompt alone, the
embedded broker and Redis, all behind proxies: real processes and real signals. First the
undisturbed run is recorded; then clients ask the same again and again, resume wherever they can,
and check every token, while one thing after another breaks, in an order that the seed decides.

The exit status is 1 where a client saw anything but its answer.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import Console

from openlora.bench.chaos_faults import FAULTS
from openlora.bench.chaos_report import FaultRow, add_rows, fault_row, record_answers
from openlora.bench.chaos_streams import Answer, Ask, Clients, asks
from openlora.bench.chaos_system import ChaosPlan, ChaosSystem
from openlora.commands.tables import print_table
from openlora.errors import SetupError

T = TypeVar("T")

SETTLE_S = 2.0
END_TIMEOUT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="order of faults, victims (default 0)")
    parser.add_argument("--streams", type=int, default=64, help="streams at once (default 64)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per stream (default 200)")
    parser.add_argument("--pace", type=float, default=20, help="tokens/s per stream (default 20)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="append the rows as JSON lines")


def run(args: argparse.Namespace) -> int:
    """Break things for a while; 0 where no client noticed more than a pause."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="openlora-chaos-") as folder:
        plan = ChaosPlan(engine=f"scripted:{args.pace:g}", proxied=True)
        system = ChaosSystem(Path(folder), plan)
        clients = Clients(system.urls, args.seed)
        try:
            rows = _storm(console, system, clients, args)
        finally:
            clients.close()
            system.stop()
    kinds = sorted({row.fault for row in rows}, key=[*FAULTS, "at the end"].index)
    added = [add_rows([row for row in rows if row.fault == kind]) for kind in kinds]
    _print_table(added)
    if args.out:
        with args.out.open("ab") as out:
            out.writelines(msgspec.json.encode(row) + b"\n" for row in added)
    for row in added:
        for mishap in row.mishaps:
            console.print(f"{row.fault}: {mishap}", markup=False)
    return 0 if all(row.is_clean for row in added) else 1


def _storm(
    console: Console, system: ChaosSystem, clients: Clients, args: argparse.Namespace
) -> list[FaultRow]:
    system.start()
    questions = asks(args.streams, args.tokens)
    console.print(f"recording the undisturbed run of {args.streams} streams")
    answers = record_answers(clients, questions, args.tokens)
    chance = random.Random(args.seed)
    turn = _forever(random.Random(args.seed), questions)

    def next_question() -> tuple[Ask, Answer]:
        ask = next(turn)
        return ask, answers[ask.name]

    clients.streams.clear()
    stop = clients.keep_going(next_question, args.streams)
    rows = []
    ends_at = time.monotonic() + 60 * args.minutes
    for name in _forever(chance, list(FAULTS)):
        if time.monotonic() > ends_at:
            break
        time.sleep(SETTLE_S)
        at = time.monotonic()
        FAULTS[name](system, chance)
        try:
            system.wait_ready()
        except SetupError as error:
            console.print(f"after '{name}': {error.message}", markup=False)
            raise
        # What it did may show a moment after everything is mended: a redelivered job, a stale ack.
        time.sleep(SETTLE_S)
        rows.append(fault_row(name, clients.streams, at, time.monotonic()))
        console.print(_line(rows[-1]), markup=False)
    at = time.monotonic()
    stop()
    clients.wait(clients.streams, END_TIMEOUT_S)
    rows.append(fault_row("at the end", clients.streams, at, time.monotonic()))
    tokens = sum(len(stream.times) for stream in clients.streams)
    console.print(f"{len(clients.streams)} streams, {tokens} tokens checked")
    return rows


def _forever(chance: random.Random, things: Sequence[T]) -> Iterator[T]:
    """All of them in a random order, and again."""
    while True:
        order = [*things]
        chance.shuffle(order)
        yield from order


def _line(row: FaultRow) -> str:
    seen = "clean" if row.is_clean else f"{row.lost} lost, {row.repeated} repeated, {row.changed}"
    return f"{row.fault}: {row.hit} streams hit, {seen}, worst stall {row.worst_stall_s:.2f} s"


def _print_table(rows: list[FaultRow]) -> None:
    columns = ("fault", "times", "streams hit", "lost", "repeated", "changed", "failed",
               "restarted", "refused", "worst stall, s", "worst first token, s")  # fmt: skip
    print_table(
        columns,
        [
            (
                *(row.fault, row.times, row.hit, row.lost, row.repeated, row.changed, row.failed),
                *(row.restarted, row.refused, row.worst_stall_s, row.worst_wait_s),
            )
            for row in rows
        ],
    )
