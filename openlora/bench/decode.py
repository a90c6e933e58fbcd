"""Time per decode step of the engine alone: no Kafka, no Redis, no network.

examples:
  python -m openlora.bench decode --shape 8b --batch 64,256 --distinct 0,1,64 --out rows.jsonl
  python -m openlora.bench decode --shape 8b --zipf-pool 1000 --requests 512 --gpu-adapters 64
  python -m openlora.bench decode --shape 8b --loads --batch 64 --gpu-adapters 64
  python -m openlora.bench decode --shape 8b --batch 1,64 --distinct 0,1,64 --deterministic
  python -m openlora.bench decode --rank 8,16,32,64 --targets attention --ensemble 2
  python -m openlora.bench decode --device cpu --model demo

With --shape: dummy weights of the Llama-3.1-8B or Llama-3.2-1B shape. Each batch is submitted at
once, greedy, EOS ignored; step_ms is (time for 8 + output tokens - time for 8) / output, host
time with everything included. distinct 0 is the base model.

With --model: real weights, beside transformers and PEFT in the same run ("demo": the demo
model), after a warm-up and in turns. decode: tokens behind the first, by the time behind the
first; total: all tokens, by the time from submission, prompts included. Without --dtype a CPU
runs both fp32 and bf16. The share is of what the measured memory speed allows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from openlora.engine.config import ATTENTION_BACKENDS, MAX_GRAPH_TOKENS
from openlora.errors import SetupError

_SWITCH_INTERVAL_S = 0.0005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench decode``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=("8b", "1b"), default="8b", help="default 8b")
    what.add_argument("--model", metavar="M", help="demo, or a model directory: compare with PEFT")
    parser.add_argument(
        "--batch", type=_numbers, metavar="N,…", help="default 64; zipf: 256; --model: 1,8"
    )
    parser.add_argument(
        "--distinct", type=_numbers, metavar="N,…", help="default 64; --model: 0,1,8"
    )
    parser.add_argument(
        "--rank", type=_numbers, default=(16,), metavar="N,…", help="of the adapters in turn"
    )
    parser.add_argument(
        "--targets", choices=("all", "attention"), default="all", help="linears with LoRA"
    )
    parser.add_argument(
        "--ensemble", type=int, default=1, metavar="N", help="adapters of each request"
    )
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens; default 128, --model: 64")
    parser.add_argument("--output", type=int, metavar="N", help="tokens; default 128, --model: 48")
    parser.add_argument("--lora", choices=("on", "off"), default="on", help="off: no adapter pages")
    parser.add_argument("--gpu-adapters", type=int, default=64, help="adapters that fit the pages")
    parser.add_argument("--zipf-pool", type=int, metavar="N", help="draw adapters zipf(1.0) from N")
    parser.add_argument(
        "--loads", action="store_true", help="what loading adapters costs a running batch"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also the share of time the GPU is busy (CUDA)"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="logits that do not depend on the batch (CUDA): what that costs",
    )
    parser.add_argument(
        "--max-graph-tokens",
        type=int,
        default=MAX_GRAPH_TOKENS,
        metavar="N",
        help="steps with prefill of up to N tokens run as CUDA graphs (default %(default)s); "
        "0: none",
    )
    parser.add_argument("--requests", type=int, default=512, help="of the zipf case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    parser.add_argument(
        "--attention-backend",
        choices=ATTENTION_BACKENDS,
        default="auto",
        help="what computes attention on a GPU; with --shape",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the rows to FILE")


def run(args: argparse.Namespace) -> int:
    """Run the cases; returns the exit status."""
    if args.model is not None:
        from openlora.bench.decode_compare import compare

        if args.deterministic:
            raise SetupError("--deterministic is measured with --shape; leave --model out")
        if len(args.rank) > 1:
            raise SetupError(f"--model compares adapters of one rank, not of {args.rank}")
        (args.rank,) = args.rank
        compare(args)
        return 0
    args.batch = args.batch or ((64,) if args.zipf_pool is None else (256,))
    args.distinct = args.distinct if args.distinct is not None else (64,)
    args.prompt, args.output = args.prompt or 128, args.output or 128
    _check(args)
    # As in a worker: the threads that load adapters keep the engine's waiting for no longer.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    from openlora.bench.decode_cases import decode_cases, loads_case, zipf_case

    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as folder:
        if args.loads:
            loads_case(args, Path(folder))
        elif args.zipf_pool is None:
            decode_cases(args, Path(folder))
        else:
            zipf_case(args, Path(folder))
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 1,64")
    return numbers


def _check(args: argparse.Namespace) -> None:
    if min(args.batch) < 1:
        raise SetupError(f"batch is {min(args.batch)}; it must be at least 1")
    if min(args.rank) < 1 or args.ensemble < 1:
        raise SetupError(f"rank is {min(args.rank)}, ensemble {args.ensemble}; both are at least 1")
    most = max(args.distinct)
    if any(0 < distinct < args.ensemble for distinct in args.distinct):
        raise SetupError(f"an ensemble of {args.ensemble} needs at least as many adapters")
    if args.loads and args.gpu_adapters < 2:
        raise SetupError("--loads needs pages for a batch and one adapter more: --gpu-adapters 2")
    if args.lora == "off" and (most or args.zipf_pool):
        raise SetupError("--lora off serves the base model alone; say --distinct 0")
    if most > args.gpu_adapters and args.zipf_pool is None and not args.loads:
        raise SetupError(
            f"distinct is {most}, but --gpu-adapters {args.gpu_adapters} is all that fits the pages"
        )
