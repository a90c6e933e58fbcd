"""The whole path with a scripted engine: websocket → Kafka → worker → Redis → websocket.

Runs, one after the other on the same broker and Redis:
  relay        a bare relay (Redis publish → websockets), the limit of this machine: every stream's
               tokens as fast as it takes them
  throughput   the same through the whole path; the engine offers what the relay could carry, so it
               is behind its time and joins steps, as the relay does. Tokens per second from the
               first request to the last token, all of them received
  latency      a load in a steady state: every stream asks again when its request has ended, so that
               requests start and end all the time, evenly spread. emit → receive is from the
               engine's step to the client's receive. Added time to the first token is from the
               request to its first token, without its wait in the engine. Twice: at half of the
               throughput that is the goal (60 % of the relay's), which is where the goals for
               latency are; and at half of what the path reached, which is the more the faster it is
  --loads      the latency run at loads of your choice, of relay and whole path. A load is kept up
               with if 95 % of it comes (a stream rests until its next request is running) and 99 %
               of the tokens are no older than 100 ms

The engine's tokens say the time of their step, so latency costs the product nothing to measure.
Client, engine, brokers and product share the machine's cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import msgspec

from openlora.bench.pipeline_model import write_tokenizer
from openlora.bench.pipeline_report import GOAL_SHARE_OF_RELAY, print_loads, print_table
from openlora.bench.pipeline_runs import (
    Measured,
    measure_latency,
    measure_relay,
    measure_relay_load,
    measure_throughput,
)
from openlora.bench.pipeline_system import Brokers, running_brokers

KEPT_UP_SHARE, KEPT_UP_P99_MS = 0.95, 100.0
RUNS = ("relay", "throughput", "latency at half the goal", "latency at half")


class LoadRow(msgspec.Struct, frozen=True):
    """One offered load in a steady state, and whether it was kept up with."""

    path: str
    offered_tok_s: int
    tok_s: int
    requests_s: float
    latency_p50_ms: float
    latency_p99_ms: float
    added_ttft_p50_ms: float
    added_ttft_p99_ms: float
    cpu_us_per_token: dict[str, float]
    kept_up: bool


class PipelineRow(msgspec.Struct, frozen=True):
    """One line of ``--out``."""

    streams: int
    tokens: int
    cores: int
    relay_tok_s: int
    throughput_tok_s: int
    share_of_relay: float
    goal_latency: LoadRow
    latency: LoadRow
    loads: list[LoadRow]
    cpu_share: dict[str, dict[str, float]]
    errors: int
    case: str = "pipeline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--streams", type=int, default=200, help="concurrent websocket streams")
    parser.add_argument("--tokens", type=int, default=250, help="tokens of each request")
    parser.add_argument("--seconds", type=float, default=8.0, help="measured time of a latency run")
    parser.add_argument(
        "--loads", metavar="TOK_S,…", type=_loads, default=(), help="loads to measure as well"
    )
    parser.add_argument("--out", metavar="FILE", help="append the result as one JSON line")


def _loads(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Run all of it, print a table; 1 if a stream failed."""
    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as name:
        directory = Path(name)
        model = write_tokenizer(directory / "model")
        with running_brokers(directory) as brokers:
            row, errors = _measure(args, brokers, model)
    print_table(row)
    if row.loads:
        print_loads(row.loads)
    if args.out:
        with Path(args.out).open("ab") as out:
            out.write(msgspec.json.encode(row) + b"\n")
    for error in sorted(set(errors)):
        print(f"stream failed: {error}", file=sys.stderr)
    return 1 if row.errors else 0


def _measure(
    args: argparse.Namespace, brokers: Brokers, model: Path
) -> tuple[PipelineRow, list[str]]:
    streams, tokens, seconds = args.streams, args.tokens, args.seconds
    relay = measure_relay(brokers, streams, tokens)
    throughput = measure_throughput(brokers, model, streams, tokens, relay.tokens_per_s)
    goal = GOAL_SHARE_OF_RELAY * relay.tokens_per_s / 2
    goal_latency = measure_latency(brokers, model, streams, tokens, goal, seconds)
    half = throughput.tokens_per_s / 2
    latency = measure_latency(brokers, model, streams, tokens, half, seconds)
    runs = [relay, throughput, goal_latency, latency]
    loads = []
    for load in args.loads:
        bare = measure_relay_load(brokers, streams, load, seconds)
        whole = measure_latency(brokers, model, streams, tokens, load, seconds)
        loads += [load_row("relay", load, bare), load_row("whole", load, whole)]
        runs += [bare, whole]
    errors = [error for measured in runs for error in measured.result.errors]
    row = PipelineRow(
        streams=streams,
        tokens=tokens,
        cores=os.cpu_count() or 1,
        relay_tok_s=round(relay.tokens_per_s),
        throughput_tok_s=round(throughput.tokens_per_s),
        share_of_relay=round(throughput.tokens_per_s / relay.tokens_per_s, 3),
        goal_latency=load_row("whole", goal, goal_latency),
        latency=load_row("whole", half, latency),
        loads=loads,
        cpu_share={
            name: {process: round(share, 2) for process, share in measured.cpu_share.items()}
            for name, measured in zip(RUNS, runs, strict=False)
        },
        errors=len(errors),
    )
    return row, errors


def load_row(path: str, offered_tok_s: float, measured: Measured) -> LoadRow:
    """``measured`` as a row. ``path``: "relay" or "whole"."""
    seen, tokens_per_s = measured.result, measured.tokens_per_s
    return LoadRow(
        path=path,
        offered_tok_s=round(offered_tok_s),
        tok_s=round(tokens_per_s),
        requests_s=round(seen.requests / seen.seconds, 1),
        latency_p50_ms=round(seen.latency.p50_ms, 2),
        latency_p99_ms=round(seen.latency.p99_ms, 2),
        added_ttft_p50_ms=round(seen.added_ttft.p50_ms, 2),
        added_ttft_p99_ms=round(seen.added_ttft.p99_ms, 2),
        cpu_us_per_token={
            name: round(share / max(1.0, tokens_per_s) * 1e6, 1)
            for name, share in measured.cpu_share.items()
        },
        kept_up=(
            tokens_per_s >= KEPT_UP_SHARE * offered_tok_s
            and seen.latency.p99_ms <= KEPT_UP_P99_MS
            and not seen.errors
        ),
    )
