"""A file of many lines over many adapters, each answered exactly once, whatever is killed.

Broker, Redis, a gateway, two workers with a scripted engine (it computes nothing, and its answer
depends on the prompt alone) and a producer, all real processes. Every result is compared byte by
byte with what it has to be. With --kill, each process is killed (kill -9) in turn at another place
of the batch, the submitting command twice: in the middle of its file, and while it waits.

The exit status is 1 where a line was lost, came twice, or has another answer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import msgspec
from rich.console import Console

from openlora.bench.bulk_kills import KILLS, half_a_submission
from openlora.bench.bulk_lines import Expected, Lines, Verdict
from openlora.bench.bulk_system import BulkPlan, BulkSystem
from openlora.commands.tables import print_table
from openlora.errors import InternalError


class KillRow(msgspec.Struct, frozen=True):
    """One process killed.

    Attributes:
        at_line: lines done then.
        stall_s: until the next line was done.
    """

    killed: str
    at_line: int
    stall_s: float


class BulkRow(msgspec.Struct, frozen=True):
    """One line of ``--out``. Rates are of the time from submission, and from the first published
    line to the last answered one; ``peak_mb``: resident memory by process."""

    lines: int
    adapters: int
    broker: str
    results: int
    lost: int
    doubled: int
    changed: int
    failed: int
    seconds: float
    lines_per_s: float
    running_lines_per_s: float
    peak_mb: dict[str, float]
    kills: list[KillRow]
    case: str = "bulk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--lines", type=int, default=20_000, help="of the file (default 20,000)")
    parser.add_argument("--adapters", type=int, default=1000, help="they name (default 1,000)")
    parser.add_argument("--tokens", type=int, default=8, help="a line at most (default 8)")
    parser.add_argument("--workers", type=int, default=2, help="GPU workers (default 2)")
    parser.add_argument(
        "--engine", default="scripted", help="of the workers: scripted[:STEPS_PER_S]"
    )
    parser.add_argument("--kill", action="store_true", help="kill -9 each process in turn")
    parser.add_argument(
        "--kafka-server",
        metavar="PROGRAM",
        type=Path,
        help="runs a broker that keeps its messages: PROGRAM DATA_DIR PORT; default: the embedded",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="append the row as a JSON line")


def run(args: argparse.Namespace) -> int:
    """Run the batch; 0 where every line has its one answer."""
    console = Console(highlight=False)
    lines = Lines(args.lines, args.adapters, args.tokens)
    with tempfile.TemporaryDirectory(prefix="openlora-bulk-") as name:
        folder = Path(name)
        system = BulkSystem(folder, BulkPlan(args.workers, args.engine, args.kafka_server))
        try:
            system.start()
            system.register(args.adapters)
            row, verdict = _run_batch(console, system, lines, kill=args.kill)
        finally:
            system.stop()
    _print(row)
    for words in verdict.wrong:
        console.print(words, markup=False)
    if args.out:
        with args.out.open("ab") as out:
            out.write(msgspec.json.encode(row) + b"\n")
    return 0 if verdict.is_clean else 1


def _run_batch(
    console: Console, system: BulkSystem, lines: Lines, *, kill: bool
) -> tuple[BulkRow, Verdict]:
    path = lines.write(system.folder / "lines.jsonl")
    kills: list[KillRow] = []
    if kill:
        half_a_submission(system, lines)
        kills.append(KillRow("batch submit, half-way", 0, 0.0))
    began = time.monotonic()
    command = system.submit(str(path), "--wait")
    assert command.stdout is not None
    batch_id = command.stdout.readline().decode().strip()
    if not batch_id:
        raise InternalError(f"`openlora batch submit` said no ID\n{system.last_lines()}")
    if kill:
        command.kill()
        kills.append(KillRow("batch submit --wait", system.state(batch_id).done, 0.0))
        kills += _kill_all(console, system, batch_id, lines.count)
    state = system.watch(batch_id, lines.count + 1)
    seconds = time.monotonic() - began
    if not kill and command.wait() != 0:
        raise InternalError(f"`openlora batch submit --wait` ended with {command.returncode}")
    console.print(f"{state.status} after {seconds:.0f} s; comparing the results")
    results = b"".join(system.store.results(batch_id)).splitlines()
    verdict = Expected(lines, system.model).check(results)
    running_s = (state.assembling_ms - state.started_ms) / 1000
    row = BulkRow(
        lines=lines.count,
        adapters=lines.adapters,
        broker=system.broker.spec.name,
        results=verdict.results,
        lost=verdict.lost,
        doubled=verdict.doubled,
        changed=verdict.changed,
        failed=verdict.failed,
        seconds=round(seconds, 1),
        lines_per_s=round(lines.count / seconds),
        running_lines_per_s=round(lines.count / running_s),
        peak_mb={name: round(size) for name, size in sorted(system.peak_mb.items())},
        kills=kills,
    )
    return row, verdict


def _kill_all(console: Console, system: BulkSystem, batch_id: str, lines: int) -> list[KillRow]:
    rows = []
    for number, (name, kill) in enumerate(KILLS.items(), start=1):
        state = system.watch(batch_id, lines * number // (len(KILLS) + 1))
        if state.phase == "over":
            raise InternalError(f"the batch was over before the {name} was killed; --lines more")
        at = time.monotonic()
        kill(system)
        system.keep()
        system.watch(batch_id, system.state(batch_id).done + 1)
        rows.append(KillRow(name, state.done, round(time.monotonic() - at, 1)))
        console.print(f"killed at line {state.done:,}: {name}, {rows[-1].stall_s} s", markup=False)
    return rows


def _print(row: BulkRow) -> None:
    if row.kills:
        print_table(
            ("kill -9", "at line", "stall, s"),
            [(kill.killed, kill.at_line, kill.stall_s) for kill in row.kills],
        )
    print_table(
        ("lines", "results", "lost", "doubled", "changed", "failed", "s", "lines/s", "running"),
        [
            (
                *(row.lines, row.results, row.lost, row.doubled, row.changed, row.failed),
                *(row.seconds, row.lines_per_s, row.running_lines_per_s),
            )
        ],
    )
    print_table(("process", "peak MB"), list(row.peak_mb.items()))
