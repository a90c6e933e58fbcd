"""Settings of the producer process: flags first, then environment. Frozen."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openlora.errors import SetupError
from producer.bulk.state import KEEP_OVER_S

ENVIRONMENT: dict[str, str] = {
    "OPENLORA_KAFKA": "Kafka bootstrap servers, host:port[,host:port…]",
    "OPENLORA_REDIS": "Redis URL, redis://[:password@]host:port/0",
    "OPENLORA_PARTITIONS": "partitions of the job topics when they are created (default 32)",
    "OPENLORA_BATCHES": "folder of input and result files, shared with gateways",
    "OPENLORA_KEEP_BATCHES_S": "seconds that a batch is known after its end; its result files stay "
    "(default 2592000, 30 days)",
    "OPENLORA_LOG_LEVEL": "debug, info, warning or error (default warning)",
}
MOST_KEEP_S = 100 * 366 * 86_400
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class ProducerConfig:
    """Everything a producer process needs to know.

    Attributes:
        batches: root of the file store.
        concurrency: steps done at a time, of different batches.
        keep_batches_s: how long a batch that is over is known; its result files stay.
    """

    kafka: str
    redis: str = field(repr=False)  # its URL may hold a password
    batches: Path
    partitions: int = 32
    concurrency: int = 2
    keep_batches_s: int = KEEP_OVER_S
    log_level: str = "warning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The producer's flags. Defaults come from the environment, in ``config_from``."""

    def flag(name: str, metavar: str, variable: str) -> None:
        parser.add_argument(name, metavar=metavar, help=f"{ENVIRONMENT[variable]} [{variable}]")

    flag("--kafka", "SERVERS", "OPENLORA_KAFKA")
    flag("--redis", "URL", "OPENLORA_REDIS")
    flag("--partitions", "N", "OPENLORA_PARTITIONS")
    flag("--batches", "DIR", "OPENLORA_BATCHES")
    flag("--keep-batches-s", "S", "OPENLORA_KEEP_BATCHES_S")
    flag("--log-level", "L", "OPENLORA_LOG_LEVEL")
    parser.add_argument(
        "--concurrency", metavar="N", default="2", help="steps done at a time (default 2)"
    )


def config_from(args: argparse.Namespace, environ: Mapping[str, str]) -> ProducerConfig:
    """The settings of ``args``, then ``environ``. Raises SetupError naming a bad value."""
    batches = args.batches or environ.get("OPENLORA_BATCHES")
    log_level = args.log_level or environ.get("OPENLORA_LOG_LEVEL") or "warning"
    if log_level not in LOG_LEVELS:
        raise SetupError(f"log-level is {log_level!r}; it must be one of {', '.join(LOG_LEVELS)}")
    partitions = args.partitions or environ.get("OPENLORA_PARTITIONS") or "32"
    return ProducerConfig(
        kafka=args.kafka or environ.get("OPENLORA_KAFKA") or "127.0.0.1:9092",
        redis=args.redis or environ.get("OPENLORA_REDIS") or "redis://127.0.0.1:6379/0",
        batches=Path(batches).expanduser() if batches else batches_dir(environ),
        partitions=_integer("partitions", partitions, 10_000),
        concurrency=_integer("concurrency", args.concurrency, 64),
        keep_batches_s=_integer(
            "keep-batches-s",
            args.keep_batches_s or environ.get("OPENLORA_KEEP_BATCHES_S") or str(KEEP_OVER_S),
            MOST_KEEP_S,
        ),
        log_level=log_level,
    )


def batches_dir(environ: Mapping[str, str]) -> Path:
    """Where this user's files are kept: results are no cache."""
    root = environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local/state") / "openlora" / "batches"


def _integer(name: str, value: str, most: int) -> int:
    number = int(value) if value.isascii() and value.isdigit() else 0
    if not 1 <= number <= most:
        raise SetupError(f"{name} is {value!r}; it must be a whole number, 1 to {most}")
    return number
