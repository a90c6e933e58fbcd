"""Run one gateway: websockets and HTTP in front of Kafka and Redis.

examples:
  openlora gateway --kafka kafka:9092 --redis redis://redis:6379/0 --host 0.0.0.0
  OPENLORA_API_KEYS=acme:secret openlora gateway

SIGTERM or SIGINT: it takes no new work, lets the open streams finish, and exits.
"""

from __future__ import annotations

import argparse

from gateway.config import add_arguments, config_from
from openlora.commands.config import process_environment

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit status."""
    config = config_from(args, process_environment())
    from gateway.main import run as run_gateway

    return run_gateway(config)
