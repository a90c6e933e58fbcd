"""The whole path with a scripted engine: websocket → Kafka → worker → Redis → websocket.

Three runs, one after the other on the same broker and Redis:
  relay        a bare relay (Redis publish → websockets), the limit of this machine
  throughput   all streams at once; the engine offers what the relay could carry
  latency      half of that load: from the engine's step to the client's receive, and what the
               path adds to the time to the first token (its wait in the engine taken off)

The engine's tokens say the time of their step, so latency costs the product nothing to measure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from openlora.bench.pipeline_client import ClientPlan, ClientResult
from openlora.bench.pipeline_model import write_tokenizer
from openlora.bench.pipeline_relay import publish_steps, step_message
from openlora.bench.pipeline_system import (
    Brokers,
    System,
    running_brokers,
    running_relay,
    running_system,
)
from openlora.errors import SetupError

GOAL_SHARE_OF_RELAY = 0.6
GOAL_LATENCY_P50_MS, GOAL_LATENCY_P99_MS = 5.0, 25.0
GOAL_ADDED_TTFT_P50_MS = 30.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: what the client saw, and each process's share of one core."""

    result: ClientResult
    cpu_share: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Tokens received per second, from the first request sent to the last token."""
        return self.result.tokens / self.result.seconds


class PipelineRow(msgspec.Struct, frozen=True):
    """One line of ``--out``."""

    streams: int
    cores: int
    relay_tok_s: float
    throughput_tok_s: float
    share_of_relay: float
    latency_load_tok_s: float
    latency_p50_ms: float
    latency_p99_ms: float
    added_ttft_p50_ms: float
    added_ttft_p99_ms: float
    cpu_share: dict[str, dict[str, float]]
    errors: int
    case: str = "pipeline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--streams", type=int, default=200, help="concurrent websocket streams")
    parser.add_argument("--tokens", type=int, default=500, help="tokens per stream (throughput)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the latency run")
    parser.add_argument("--out", metavar="FILE", help="append the result as one JSON line")


def run(args: argparse.Namespace) -> int:
    """Run all of it, print a table; 1 if a stream failed."""
    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as name:
        directory = Path(name)
        model = write_tokenizer(directory / "model")
        with running_brokers(directory) as brokers:
            relay = measure_relay(brokers, args.streams, args.tokens)
            throughput = measure_throughput(
                brokers, model, args.streams, args.tokens, relay.tokens_per_s
            )
            load = throughput.tokens_per_s / 2
            latency = measure_latency(brokers, model, args.streams, load, args.seconds)
    row = summarise(args.streams, relay, throughput, latency)
    print_table(row)
    if args.out:
        with Path(args.out).open("ab") as out:
            out.write(msgspec.json.encode(row) + b"\n")
    for measured in (relay, throughput, latency):
        for error in sorted(set(measured.result.errors)):
            print(f"stream failed: {error}", file=sys.stderr)
    return 1 if row.errors else 0


def measure_relay(brokers: Brokers, streams: int, tokens: int) -> Measured:
    """The bare relay with ready-made frames, published as fast as Redis takes them."""
    messages = [step_message(streams, index) for index in range(tokens)]
    with running_relay(brokers, streams) as system:
        plan = ClientPlan(system.url, relay=True, streams=streams, requests=1, tokens=tokens)
        publisher = threading.Thread(target=publish_steps, args=(brokers.redis.address, messages))
        return _run_client(system, plan, publisher)


def measure_throughput(
    brokers: Brokers, model: Path, streams: int, tokens: int, offered_tok_s: float
) -> Measured:
    """Every stream asks at once; the engine's steps come at the pace of ``offered_tok_s``.

    Without a pace the whole run would be one backlog, sent in large pieces: more tokens per second
    than anybody could be served that way.
    """
    with running_system(brokers, model, f"clock:{offered_tok_s / streams:.3f}") as system:
        plan = ClientPlan(system.url, relay=False, streams=streams, requests=1, tokens=tokens)
        return _run_client(system, plan)


def measure_latency(
    brokers: Brokers, model: Path, streams: int, tokens_per_s: float, seconds: float
) -> Measured:
    """A steady load: each stream sends its next request when one is done."""
    steps_per_s = tokens_per_s / streams
    requests = max(2, round(seconds / 2.5))
    tokens = max(1, round(steps_per_s * seconds / requests))
    with running_system(brokers, model, f"clock:{steps_per_s:.3f}") as system:
        plan = ClientPlan(
            system.url,
            relay=False,
            streams=streams,
            requests=requests,
            tokens=tokens,
            stagger=True,
        )
        return _run_client(system, plan)


def _run_client(
    system: System, plan: ClientPlan, publisher: threading.Thread | None = None
) -> Measured:
    argument = msgspec.json.encode(plan).decode()
    before = system.cpu_seconds()
    client = subprocess.Popen(
        [sys.executable, "-m", "openlora.bench.pipeline_client", argument],
        stdout=subprocess.PIPE,
    )
    if publisher is not None:
        publisher.start()
    output, _ = client.communicate()
    if client.returncode != 0:
        raise SetupError(f"the benchmark's client ended with status {client.returncode}")
    after = system.cpu_seconds()
    if publisher is not None:
        publisher.join()
    result = msgspec.json.decode(output, type=ClientResult)
    share = {name: (after[name] - before[name]) / result.seconds for name in after}
    share["client"] = result.cpu_seconds / result.seconds
    return Measured(result, share)


def summarise(
    streams: int, relay: Measured, throughput: Measured, latency: Measured
) -> PipelineRow:
    """The three runs as one row."""
    seen = latency.result
    return PipelineRow(
        streams=streams,
        cores=os.cpu_count() or 1,
        relay_tok_s=round(relay.tokens_per_s),
        throughput_tok_s=round(throughput.tokens_per_s),
        share_of_relay=round(throughput.tokens_per_s / relay.tokens_per_s, 3),
        latency_load_tok_s=round(latency.tokens_per_s),
        latency_p50_ms=round(seen.latency.p50_ms, 2),
        latency_p99_ms=round(seen.latency.p99_ms, 2),
        added_ttft_p50_ms=round(seen.added_ttft.p50_ms, 2),
        added_ttft_p99_ms=round(seen.added_ttft.p99_ms, 2),
        cpu_share={
            name: {process: round(share, 2) for process, share in run.cpu_share.items()}
            for name, run in (("relay", relay), ("throughput", throughput), ("latency", latency))
        },
        errors=sum(len(run.result.errors) for run in (relay, throughput, latency)),
    )


def print_table(row: PipelineRow) -> None:
    """The result beside its goals, and where the CPU went."""
    console = Console()
    table = Table("measured", "value", "goal", title=f"{row.streams} streams, {row.cores} cores")
    table.add_row("bare relay, tok/s", f"{row.relay_tok_s:,.0f}", "")
    table.add_row("whole path, tok/s", f"{row.throughput_tok_s:,.0f}", "")
    table.add_row(
        "share of bare relay", f"{row.share_of_relay:.0%}", f"≥ {GOAL_SHARE_OF_RELAY:.0%}"
    )
    table.add_row("latency run, tok/s", f"{row.latency_load_tok_s:,.0f}", "half of the above")
    goal = f"≤ {GOAL_LATENCY_P50_MS:g} / {GOAL_LATENCY_P99_MS:g}"
    table.add_row(
        "emit → receive p50 / p99, ms", f"{row.latency_p50_ms} / {row.latency_p99_ms}", goal
    )
    table.add_row(
        "added time to first token p50 / p99, ms",
        f"{row.added_ttft_p50_ms} / {row.added_ttft_p99_ms}",
        f"≤ {GOAL_ADDED_TTFT_P50_MS:g} / –",
    )
    console.print(table)
    processes = sorted({name for shares in row.cpu_share.values() for name in shares})
    cpu = Table("share of one core", *row.cpu_share)
    for process in processes:
        shares = (row.cpu_share[run].get(process) for run in row.cpu_share)
        cpu.add_row(process, *("" if share is None else f"{share:.0%}" for share in shares))
    console.print(cpu)
