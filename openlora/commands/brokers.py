"""Run the embedded Kafka broker and Redis server, for a system whose parts are started by hand.

examples:
  openlora brokers --kafka-port 9092 --redis-port 6379
  OPENLORA_REDIS_PASSWORD=secret openlora brokers

Both listen on 127.0.0.1 alone. The addresses are printed as variables that `openlora gateway` and
`openlora worker` read. The broker keeps everything in memory; Redis keeps its data in --data-dir.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openlora.commands.children import EmbeddedServer
from openlora.commands.config import process_environment, redis_password, state_dir
from openlora.commands.screen import Screen
from openlora.commands.signals import StopSignals
from openlora.commands.supervisor import Supervisor
from openlora.local import embedded_broker, embedded_redis

BROKER_LOST = "what was queued in its memory is published again from Redis by the gateway"
REDIS_LOST = "what it acknowledged is on disk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora brokers``."""
    parser.add_argument("--kafka-port", type=int, default=9092, metavar="P", help="default 9092")
    parser.add_argument("--redis-port", type=int, default=6379, metavar="P", help="default 6379")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="Redis data and logs (default: state folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Run both servers until a signal; returns the exit status."""
    environ = process_environment()
    data_dir = args.data_dir or state_dir(environ) / f"brokers-{args.kafka_port}"
    screen = Screen()
    broker_process = embedded_broker(data_dir, args.kafka_port)
    redis_process = embedded_redis(data_dir / "redis", args.redis_port, redis_password(environ))
    broker = EmbeddedServer(broker_process, BROKER_LOST, after_restart=lambda: None)
    redis = EmbeddedServer(redis_process, REDIS_LOST, after_restart=lambda: None)
    with StopSignals() as signals:
        supervisor = Supervisor(screen, signals, verbose=False, drain_timeout_s=0)
        try:
            supervisor.start(redis)
            supervisor.start(broker)
            screen.line(f"export OPENLORA_KAFKA={broker_process.address}")
            screen.line(f"export OPENLORA_REDIS={redis_process.address}")
            signals.hold()
            supervisor.run()
        except KeyboardInterrupt:
            pass  # stopped while starting: nothing is lost
        finally:
            supervisor.stop([[broker], [redis]])
    return 0
