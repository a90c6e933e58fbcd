"""Batch and interactive work on one system: what each costs the other.

Measured in turns, --rounds times, on the same model and machine, each from a fresh start:
  engine       a batch's lines on the bare engine, all known at once: the limit; then as many
               requests as there are streams
  system       a whole `openlora up`. batch: the same lines as a batch, nothing else to do, from the
               upload of the file to the last result. streams: the same requests at once, by
               websocket, from the first request to the last token received
and, on the last system:
  interactive  requests one after the other, first on the empty system, then while a batch runs

Goals: batch and streams alone reach 95 % of the bare engine; with a batch running, the first token
comes at most one engine step later than on the empty system at p50, and two at p99.

examples:
  openlora bench mixed --rounds 3                                the demo model
  openlora bench mixed --shape 8b --device cuda --lines 2048 --tokens 128 --prompt 128
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from openlora.bench.mixed_engine import BareRates, bare_rates
from openlora.bench.mixed_load import Client, Interactive, Workload, run_streams
from openlora.bench.mixed_report import MixedRow, median, print_round, print_table
from openlora.bench.mixed_subject import Subject, demo_subject, given_subject, random_subject
from openlora.bench.mixed_system import RunningSystem, running_system, shares
from openlora.engine.build import choose_device
from openlora.errors import SetupError

CHAT_TOKENS = 8
CHAT_PAUSE_S = 0.2
_WARM_TOKENS = 8
_STREAM_PROMPTS, _WARM_PROMPTS, _LONG_PROMPTS = 1_000_000, 2_000_000, 3_000_000
"""First numbers of the loads' prompts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="M", help="model directory; default: the demo model")
    what.add_argument(
        "--shape", metavar="S", help="random weights: 8b, 1b or the config.json of a directory"
    )
    parser.add_argument(
        "--adapters", type=int, default=64, metavar="N", help="random ones, of --shape (default 64)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=1, help="of engine and system in turns")
    parser.add_argument("--lines", type=int, default=512, help="lines of the batch")
    parser.add_argument("--tokens", type=int, default=32, help="tokens for each of them")
    parser.add_argument(
        "--prompt", type=int, default=0, metavar="N", help="least characters of a prompt"
    )
    parser.add_argument("--streams", type=int, default=64, help="websockets at once; 0: none")
    parser.add_argument("--stream-tokens", type=int, default=64, help="tokens for each of them")
    parser.add_argument("--requests", type=int, default=40, help="interactive requests of a run")
    parser.add_argument("--out", metavar="FILE", help="append the result as one JSON line")


def run(args: argparse.Namespace) -> int:
    """Run all of it and print a table; returns the exit status."""
    if args.rounds < 1:
        raise SetupError(f"rounds is {args.rounds}; it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as name:
        row = _measure(args, Path(name))
    print_table(row)
    if args.out:
        with Path(args.out).open("ab") as out:
            out.write(msgspec.json.encode(row) + b"\n")
    return 0


@dataclass(frozen=True, slots=True)
class _SystemRates:
    """What one system gave. ``cores``: what each process took during the batch."""

    batch_tok_s: float
    streams_tok_s: float
    cores: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Loads:
    warm: Workload
    batch: Workload
    streams: Workload
    long: Workload


def _measure(args: argparse.Namespace, directory: Path) -> MixedRow:
    subject = _subject(args, directory)
    loads = _loads(args, subject)
    bare: list[BareRates] = []
    systems: list[_SystemRates] = []
    empty = busy = Interactive()
    for number in range(args.rounds):
        bare.append(bare_rates(subject, args.device, loads.warm, loads.batch, loads.streams))
        folder = directory / f"round-{number}"
        folder.mkdir()
        with running_system(folder, subject, args.device) as system:
            client = Client(system.url)
            systems.append(_system_rates(system, client, loads))
            print_round(number + 1, bare[-1].batch_tok_s, systems[-1].batch_tok_s)
            if number == args.rounds - 1:
                empty, busy = _interactive(args, client, loads.long)
            client.close()
    return _row(args, subject, bare, systems, empty, busy)


def _subject(args: argparse.Namespace, directory: Path) -> Subject:
    if args.shape:
        dtype = "bfloat16" if choose_device(args.device) == "cuda" else "float32"
        return random_subject(args.shape, args.adapters, dtype, directory)
    return given_subject(Path(args.model)) if args.model else demo_subject()


def _loads(args: argparse.Namespace, subject: Subject) -> _Loads:
    def load(lines: int, tokens: int, first: int) -> Workload:
        return Workload(lines, tokens, subject.adapter_ids, first, args.prompt)

    return _Loads(
        # Every adapter once, so that none is loaded while it counts.
        warm=load(max(8, len(subject.adapters) + 1), _WARM_TOKENS, _WARM_PROMPTS),
        batch=load(args.lines, args.tokens, 0),
        streams=load(args.streams, args.stream_tokens, _STREAM_PROMPTS),
        long=load(args.lines * 8, args.tokens, _LONG_PROMPTS),
    )


def _system_rates(system: RunningSystem, client: Client, loads: _Loads) -> _SystemRates:
    client.run_batch(loads.warm.batch_file())
    before = system.cpu_seconds()
    batch, seconds = client.run_batch(loads.batch.batch_file())
    cores = shares(before, system.cpu_seconds(), seconds)
    batch_tok_s = batch["progress"]["completion_tokens"] / seconds
    streams_tok_s = run_streams(system.url, loads.streams) if loads.streams.lines else 0.0
    return _SystemRates(batch_tok_s, streams_tok_s, cores)


def _interactive(
    args: argparse.Namespace, client: Client, long: Workload
) -> tuple[Interactive, Interactive]:
    client.ask(3, CHAT_TOKENS, 0)
    empty = client.ask(args.requests, CHAT_TOKENS, CHAT_PAUSE_S)
    batch_id = client.submit(long.batch_file())
    client.wait_for_tokens(batch_id, args.tokens)
    busy = client.ask(args.requests, CHAT_TOKENS, CHAT_PAUSE_S)
    client.cancel(batch_id)
    return empty, busy


def _row(
    args: argparse.Namespace,
    subject: Subject,
    bare: Sequence[BareRates],
    systems: Sequence[_SystemRates],
    empty: Interactive,
    busy: Interactive,
) -> MixedRow:
    engine = [rates.batch_tok_s for rates in bare]
    batch = [rates.batch_tok_s for rates in systems]
    engine_streams = [rates.streams_tok_s for rates in bare]
    streams = [rates.streams_tok_s for rates in systems]
    return MixedRow(
        model=subject.name,
        device=args.device,
        cores=os.cpu_count() or 1,
        adapters=len(subject.adapters),
        lines=args.lines,
        tokens=args.tokens,
        prompt_tokens=round(bare[0].prompt_tokens, 1),
        engine_tok_s=round(median(engine), 1),
        batch_tok_s=round(median(batch), 1),
        share_of_engine=round(median(batch) / median(engine), 3),
        engine_rounds=[round(rate, 1) for rate in engine],
        batch_rounds=[round(rate, 1) for rate in batch],
        streams=args.streams,
        stream_tokens=args.stream_tokens,
        engine_streams_tok_s=round(median(engine_streams), 1),
        streams_tok_s=round(median(streams), 1),
        streams_share_of_engine=round(median(streams) / (median(engine_streams) or 1.0), 3),
        engine_streams_rounds=[round(rate, 1) for rate in engine_streams],
        streams_rounds=[round(rate, 1) for rate in streams],
        first_empty_p50_ms=round(empty.first(50), 1),
        first_empty_p99_ms=round(empty.first(99), 1),
        first_batch_p50_ms=round(busy.first(50), 1),
        first_batch_p99_ms=round(busy.first(99), 1),
        step_ms=round(busy.step_ms, 1),
        batch_cores={
            role: round(median([rates.cores.get(role, 0.0) for rates in systems]), 3)
            for role in systems[-1].cores
        },
    )
