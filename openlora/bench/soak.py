"""Does memory stay where it is? Every process of the whole path, at a steady rate, for minutes.

The system of `bench pipeline`: clients ask again whenever their request has ended; every minute all
of them hang up in mid-stream and others come. Jobs that ended are kept for a minute instead of an
hour, so that logs expire as fast as they are written. Sampled every ten seconds; the slope is that
of a straight line through the samples behind the warm-up.

The exit status is 1 where a process grows by more than the bound (64 MB an hour: at 20,000 tok/s
that is less than a byte a token), or a stream failed. The embedded broker keeps every message in
memory, by its nature, and has no bound; so has a Redis whose clients ask for more than it can hold.
What Redis holds is told beside what it takes: resident memory stays where the fullest moment so far
has left it, and its fullest moments differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
import redis
from rich.console import Console
from rich.table import Table

from openlora.bench.pipeline_model import write_tokenizer
from openlora.bench.pipeline_runs import measure_steady
from openlora.bench.pipeline_system import System, running_brokers, running_system
from openlora.errors import SetupError
from openlora.joblog import redis_client

KEEP_ENDED_S = 60
WARM_UP_S = 120.0
"""Logs expire from ``KEEP_ENDED_S`` on; caches and allocators are full a while later."""
WARM_UP_SHARE = 0.4
"""Of a run that is shorter than that would leave anything of."""
SAMPLE_S = 10.0
ROUND_S = 55.0
BOUND_MB_PER_HOUR = 64.0
UNBOUNDED = "broker"
REDIS_DATA = "redis, data"
MB = 1e6


class Memory(msgspec.Struct, frozen=True):
    """One process, resident, or what Redis holds: MB behind the warm-up, at the end, at most, and
    their trend."""

    process: str
    first_mb: float
    last_mb: float
    most_mb: float
    slope_mb_per_hour: float
    grows: bool


class SoakRow(msgspec.Struct, frozen=True):
    """One line of ``--out``."""

    minutes: float
    streams: int
    tokens: int
    offered_tok_s: int
    tok_s: int
    requests: int
    errors: int
    memory: list[Memory]
    cores: int
    case: str = "soak"


class Sampler:
    """Resident memory of every process of ``system``, and what the Redis at ``redis_url`` says that
    its data takes, in a thread: [(seconds, {name: MB})]."""

    def __init__(self, system: System, redis_url: str) -> None:
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._system = system
        self._redis = redis_client(redis_url)
        self._began = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._redis.close()

    def _run(self) -> None:
        while True:
            processes = self._system.processes
            try:
                sizes = {
                    name: process.memory_info().rss / MB for name, process in processes.items()
                }
                sizes[REDIS_DATA] = self._redis.info("memory")["used_memory"] / MB
            except (psutil.NoSuchProcess, redis.RedisError):
                return  # the clients fail with it, and say so
            self.samples.append((time.monotonic() - self._began, sizes))
            if self._stopping.wait(SAMPLE_S):
                return


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--load", type=int, default=20_000, help="tok/s offered (default 20000)")
    parser.add_argument("--streams", type=int, default=200, help="concurrent streams (default 200)")
    parser.add_argument("--tokens", type=int, default=250, help="tokens of each request")
    parser.add_argument(
        "--bound", type=float, default=BOUND_MB_PER_HOUR, help="MB an hour that are no growth"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="append the result as a JSON line")


def run(args: argparse.Namespace) -> int:
    """Run it, print a table; 1 if a process grew or a stream failed."""
    tokens, requests, seconds = 0, 0, 0.0
    errors: list[str] = []
    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as name:
        model = write_tokenizer(Path(name) / "model")
        engine = f"clock:{args.load / args.streams:.3f}"
        with (
            running_brokers(Path(name)) as brokers,
            running_system(brokers, model, engine, ("--keep-ended-s", str(KEEP_ENDED_S))) as system,
            Sampler(system, brokers.redis.address) as sampler,
        ):
            ends_at = time.monotonic() + 60 * args.minutes
            while (left := ends_at - time.monotonic()) > 0:
                window_s = min(ROUND_S, max(1.0, left))
                try:
                    seen = measure_steady(system, args.streams, args.tokens, window_s).result
                except psutil.NoSuchProcess as error:
                    raise SetupError(f"a process of the system has ended: {error}") from error
                tokens, requests = tokens + seen.tokens, requests + seen.requests
                seconds += seen.seconds
                errors += seen.errors
    row = SoakRow(
        minutes=args.minutes,
        streams=args.streams,
        tokens=args.tokens,
        offered_tok_s=args.load,
        tok_s=round(tokens / seconds),
        requests=requests,
        errors=len(errors),
        memory=trends(sampler.samples, args.bound),
        cores=os.cpu_count() or 1,
    )
    print_table(row)
    if args.out:
        with args.out.open("ab") as out:
            out.write(msgspec.json.encode(row) + b"\n")
    for reason in sorted(set(errors)):
        print(f"stream failed: {reason}", file=sys.stderr)
    return 1 if row.errors or any(memory.grows for memory in row.memory) else 0


def trends(samples: Sequence[tuple[float, dict[str, float]]], bound: float) -> list[Memory]:
    """What ``samples`` (seconds, MB by process) say of each process; ``bound``: MB an hour."""
    warm_up_s = min(WARM_UP_S, WARM_UP_SHARE * samples[-1][0])
    warm = [sample for sample in samples if sample[0] >= warm_up_s]
    found = []
    for name in warm[0][1]:
        sizes = [size[name] for _, size in warm]
        slope = 0.0
        if len(warm) > 1:
            slope = 3600 * statistics.linear_regression([at for at, _ in warm], sizes).slope
        found.append(
            Memory(
                process=name,
                first_mb=round(sizes[0], 1),
                last_mb=round(sizes[-1], 1),
                most_mb=round(max(sizes), 1),
                slope_mb_per_hour=round(slope, 1),
                grows=slope > bound and name != UNBOUNDED,
            )
        )
    return found


def print_table(row: SoakRow) -> None:
    """The processes' memory, and what they did meanwhile."""
    table = Table(box=None, pad_edge=False)
    columns = ("", "warm, MB", "end, MB", "most, MB", "MB an hour", "")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for memory in row.memory:
        verdict = "keeps all messages" if memory.process == UNBOUNDED else ""
        table.add_row(
            memory.process,
            f"{memory.first_mb:,.1f}",
            f"{memory.last_mb:,.1f}",
            f"{memory.most_mb:,.1f}",
            f"{memory.slope_mb_per_hour:+,.1f}",
            "grows" if memory.grows else verdict,
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{row.minutes:g} minutes, {row.streams} streams, {row.tok_s:,} of {row.offered_tok_s:,} "
        f"tok/s, {row.requests:,} requests, {row.errors} failed"
    )
