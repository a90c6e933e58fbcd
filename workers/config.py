"""A worker's settings: flags first, then environment. The only place that reads either."""

from __future__ import annotations

import argparse
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openlora.adapters.stores import StoreLocation, adapter_cache, store_setting
from openlora.engine.config import ATTENTION_BACKENDS, DISK_BYTES, MAX_GRAPH_TOKENS
from openlora.errors import SetupError
from openlora.joblog.core import RETIRED_TTL_S
from openlora.joblog.crashes import QUARANTINE_TTL_S

LEAST_KEEP_S = 30
"""A log that expires sooner would look lost to the worker that says its end again, and come back
(ended_runs.py)."""

ENVIRONMENT: dict[str, str] = {
    "OPENLORA_MODEL": "model: a directory with config, weights and tokenizer, or a hub ID",
    "OPENLORA_KAFKA": "Kafka bootstrap servers, host:port[,host:port…]",
    "OPENLORA_REDIS": "Redis URL, redis://[:password@]host:port/0",
    "OPENLORA_STORE": "content-addressed adapter files: a directory shared with gateways, or a URL "
    "(s3://, gs://, …; OPENLORA_ADAPTERS names one as well)",
    "OPENLORA_ADAPTER_CACHE": "folder of copies of a remote store's adapters",
    "OPENLORA_ADAPTER_CACHE_BYTES": "bytes that they may take (default 34359738368, 32 GiB)",
    "OPENLORA_DEVICE": "auto, cpu or cuda",
    "OPENLORA_DTYPE": "auto, float32, bfloat16 or float16",
    "OPENLORA_ATTENTION_BACKEND": "what computes attention on a GPU: auto, triton, flash-attn-4 or "
    "flash-attn-2; `openlora doctor` shows what auto takes",
    "OPENLORA_ENGINE": "model (default); to measure without weights: dummy, the model with random "
    "ones, or scripted:RATE / clock:RATE, which compute nothing",
    "OPENLORA_MAX_GRAPH_TOKENS": "on a GPU, steps with parts of prompts and at most so many tokens "
    f"run as CUDA graphs (default {MAX_GRAPH_TOKENS}; 0: none; those without prompts always do)",
    "OPENLORA_DETERMINISTIC": "1: a request's logits do not depend on what else runs, bit for bit "
    "(CUDA only, slower; default 0)",
    "OPENLORA_DRAIN_TIMEOUT_S": "seconds that running jobs get to end after SIGTERM (default 30)",
    "OPENLORA_KEEP_ENDED_S": "seconds that an ended job can be resumed, and Redis keeps its log "
    "(default 3600)",
    "OPENLORA_QUARANTINE_S": "seconds that an adapter which ended engines is not served (default "
    "2592000, 30 days)",
    "OPENLORA_LOG_LEVEL": "debug, info, warning or error (default warning)",
}

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOG_LEVELS = ("debug", "info", "warning", "error")
MERGES = ".merged"
"""Folder of the store that keeps merged adapters."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Everything a worker process needs to know.

    Attributes:
        model: directory or hub ID of the model; its tokenizer is there too.
        store: root of the content-addressed adapter store, shared with the gateway: a directory,
            or a URL.
        adapter_cache: directory that keeps copies of a remote store's adapters, up to
            ``adapter_cache_bytes``.
        engine: "model"; for benchmarks "dummy" (random weights, only the configuration is read), or
            "scripted:RATE" / "clock:RATE" (steps per second).
        deterministic: as ``EngineConfig.deterministic``.
        max_graph_tokens: as ``EngineConfig.max_graph_tokens``.
        worker_id: names this worker in claims and heartbeats.
        interactive_budget, batch_budget: jobs of each kind held at once, waiting ones included.
        drain_timeout_s: what running jobs get to end when the worker stops; then they are left
            to the next worker, which continues them with the next token.
        keep_ended_s: how long Redis keeps the log of a job that has ended.
        quarantine_s: how long an adapter that ended engines is not served.
    """

    model: str
    kafka: str
    redis: str = field(repr=False)  # its URL may hold a password
    store: StoreLocation
    device: str = "auto"
    dtype: str = "auto"
    attention_backend: str = "auto"
    engine: str = "model"
    deterministic: bool = False
    max_graph_tokens: int = MAX_GRAPH_TOKENS
    worker_id: str = ""
    interactive_budget: int = 512
    batch_budget: int = 256
    drain_timeout_s: float = 30.0
    keep_ended_s: int = RETIRED_TTL_S
    quarantine_s: int = QUARANTINE_TTL_S
    log_level: str = "warning"
    adapter_cache: Path = field(default_factory=lambda: adapter_cache({}))
    adapter_cache_bytes: int = DISK_BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The worker's flags. Defaults come from the environment, in ``config_from``."""

    def flag(name: str, metavar: str, variable: str) -> None:
        parser.add_argument(name, metavar=metavar, help=f"{ENVIRONMENT[variable]} [{variable}]")

    flag("--model", "M", "OPENLORA_MODEL")
    flag("--kafka", "SERVERS", "OPENLORA_KAFKA")
    flag("--redis", "URL", "OPENLORA_REDIS")
    flag("--store", "DIR", "OPENLORA_STORE")
    flag("--device", "D", "OPENLORA_DEVICE")
    flag("--dtype", "T", "OPENLORA_DTYPE")
    flag("--attention-backend", "B", "OPENLORA_ATTENTION_BACKEND")
    flag("--engine", "E", "OPENLORA_ENGINE")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help=f"{ENVIRONMENT['OPENLORA_DETERMINISTIC']} [OPENLORA_DETERMINISTIC]",
    )
    flag("--max-graph-tokens", "N", "OPENLORA_MAX_GRAPH_TOKENS")
    parser.add_argument(
        "--worker-id",
        default="",
        metavar="ID",
        help="name in claims and heartbeats, of no other worker (default: host + random)",
    )
    for kind, most in (("interactive", 512), ("batch", 256)):
        parser.add_argument(
            f"--{kind}-budget",
            type=int,
            default=most,
            metavar="N",
            help=f"{kind} jobs held at once, waiting ones included (default {most})",
        )
    flag("--drain-timeout-s", "S", "OPENLORA_DRAIN_TIMEOUT_S")
    flag("--keep-ended-s", "S", "OPENLORA_KEEP_ENDED_S")
    flag("--quarantine-s", "S", "OPENLORA_QUARANTINE_S")
    flag("--log-level", "L", "OPENLORA_LOG_LEVEL")


def config_from(args: argparse.Namespace, environ: Mapping[str, str]) -> WorkerConfig:
    """The settings of ``args``, then ``environ``. Raises SetupError naming a bad value."""
    model = args.model or environ.get("OPENLORA_MODEL")
    engine = _checked_engine(args.engine or environ.get("OPENLORA_ENGINE") or "model")
    if not model:
        raise SetupError("no model given; set --model or OPENLORA_MODEL")
    return WorkerConfig(
        model=model,
        kafka=args.kafka or environ.get("OPENLORA_KAFKA") or "127.0.0.1:9092",
        redis=args.redis or environ.get("OPENLORA_REDIS") or "redis://127.0.0.1:6379/0",
        store=store_setting(args.store, environ),
        adapter_cache=adapter_cache(environ),
        adapter_cache_bytes=_bytes(
            "OPENLORA_ADAPTER_CACHE_BYTES", environ.get("OPENLORA_ADAPTER_CACHE_BYTES")
        ),
        device=_one_of("device", args.device or environ.get("OPENLORA_DEVICE"), DEVICES),
        dtype=_one_of("dtype", args.dtype or environ.get("OPENLORA_DTYPE"), DTYPES),
        attention_backend=_one_of(
            "attention-backend",
            args.attention_backend or environ.get("OPENLORA_ATTENTION_BACKEND"),
            ATTENTION_BACKENDS,
        ),
        engine=engine,
        deterministic=args.deterministic
        or _switch("OPENLORA_DETERMINISTIC", environ.get("OPENLORA_DETERMINISTIC")),
        max_graph_tokens=_whole_number(
            "max-graph-tokens",
            args.max_graph_tokens or environ.get("OPENLORA_MAX_GRAPH_TOKENS"),
            "tokens",
            0,
            MAX_GRAPH_TOKENS,
        ),
        worker_id=args.worker_id or f"{socket.gethostname()}-{secrets.token_hex(4)}",
        interactive_budget=_at_least_one("interactive-budget", args.interactive_budget),
        batch_budget=_at_least_one("batch-budget", args.batch_budget),
        drain_timeout_s=_seconds(
            "drain-timeout-s", args.drain_timeout_s or environ.get("OPENLORA_DRAIN_TIMEOUT_S")
        ),
        keep_ended_s=_whole_number(
            "keep-ended-s",
            args.keep_ended_s or environ.get("OPENLORA_KEEP_ENDED_S"),
            "seconds",
            LEAST_KEEP_S,
            RETIRED_TTL_S,
        ),
        quarantine_s=_whole_number(
            "quarantine-s",
            args.quarantine_s or environ.get("OPENLORA_QUARANTINE_S"),
            "seconds",
            1,
            QUARANTINE_TTL_S,
        ),
        log_level=_one_of(
            "log-level",
            args.log_level or environ.get("OPENLORA_LOG_LEVEL") or "warning",
            LOG_LEVELS,
        ),
    )


def _one_of(name: str, value: str | None, allowed: tuple[str, ...]) -> str:
    chosen = value or allowed[0]
    if chosen not in allowed:
        raise SetupError(f"{name} is {chosen!r}; it must be one of {', '.join(allowed)}")
    return chosen


def _switch(name: str, value: str | None) -> bool:
    if value not in (None, "", "0", "1"):
        raise SetupError(f"{name} is {value!r}; it must be 1 or 0")
    return value == "1"


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise SetupError(f"{name} is {value}; it must be at least 1")
    return value


def _bytes(name: str, value: str | None) -> int:
    if value is None:
        return DISK_BYTES
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise SetupError(f"{name} is {value!r}; it must be a whole number of bytes, 1 or more")
    return int(value)


def _seconds(name: str, value: str | None) -> float:
    try:
        seconds = float(value) if value is not None else 30.0
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise SetupError(f"{name} is {value!r}; it must be a number of seconds, 0 or more")
    return seconds


def _whole_number(name: str, value: str | None, unit: str, least: int, default: int) -> int:
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise SetupError(
            f"{name} is {value!r}; it must be a whole number of {unit}, {least} or more"
        )
    return int(value)


def _checked_engine(value: str) -> str:
    kind, _, rate = value.partition(":")
    try:
        rate_ok = float(rate or 0) >= 0
    except ValueError:
        rate_ok = False
    is_known = kind in ("scripted", "clock") or value in ("model", "dummy")
    if not (is_known and rate_ok):
        raise SetupError(
            f"engine is {value!r}; it must be model, dummy, scripted[:RATE] or clock[:RATE]"
        )
    return value
