"""Benchmarks of this machine.

  decode     time per decode step of the engine alone, with and without adapters
  adapters   throughput and first tokens over more adapters than fit
  serve      a running system under the load of many clients, as they see it
  pipeline   the whole path with a scripted engine: tokens/s, added latency, CPU shares
  mixed      a batch's share of the bare engine, and what it costs interactive requests
  bulk       a file of many lines, each answered once, whatever is killed
  soak       memory of every process over minutes at full rate
  chaos      everything breaks, again and again: what clients saw of it
  kernels    bandwidth of the GPU kernels, beside a plain device copy
  attention  the attention backends beside each other

examples:
  openlora bench decode --device cpu --model demo
  openlora bench decode --shape 8b --batch 64,256 --distinct 0,1,64 --out rows.jsonl
  openlora bench serve --streams 64 --url http://127.0.0.1:8000
  openlora bench pipeline --streams 200
  openlora bench bulk --lines 100000 --kill
  openlora bench soak --minutes 10
  openlora bench chaos --minutes 10 --seed 1
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

from openlora.errors import OpenLoRAError

# One module each, so that `decode` needs only the engine's packages.
BENCHMARKS = {
    "decode": ("openlora.bench.decode", "time per decode step of the engine alone"),
    "adapters": ("openlora.bench.adapters", "more adapters than fit, by popularity and rank"),
    "serve": ("openlora.bench.serve", "a running system under load, as its clients see it"),
    "pipeline": ("openlora.bench.pipeline", "the whole path with a scripted engine"),
    "mixed": ("openlora.bench.mixed", "batch and interactive work beside each other"),
    "bulk": ("openlora.bench.bulk", "a file of many lines, and what is killed meanwhile"),
    "soak": ("openlora.bench.soak", "memory of every process over minutes at full rate"),
    "chaos": ("openlora.bench.chaos", "everything breaks; what clients saw of it"),
    "kernels": ("openlora.bench.kernels", "bandwidth of the GPU kernels, beside a copy"),
    "attention": ("openlora.bench.attention", "the attention backends beside each other"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take everything behind the benchmark's name as it is: its own parser reads it."""
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `… BENCHMARK --help`")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark named; returns its exit status."""
    module = importlib.import_module(BENCHMARKS[args.benchmark][0])
    parser = argparse.ArgumentParser(
        prog=f"openlora bench {args.benchmark}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    # As Ctrl-C does: what it made below the temporary directory, gigabytes of it, is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return int(module.run(parser.parse_args(args.arguments)))


def main() -> int:
    """``python -m openlora.bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m openlora.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except OpenLoRAError as error:
        print(f"openlora bench: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
