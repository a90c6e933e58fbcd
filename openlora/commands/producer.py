"""Run one producer: it reads batches, publishes their lines and collects the answers.

examples:
  openlora producer --kafka kafka:9092 --redis redis://redis:6379/0 --batches /mnt/batches
  celery -b redis://redis:6379/0 inspect active

It is a Celery worker (Redis is broker and result backend), with the steward that queues its tasks
and the collector of answers beside it. Start as many as there is to read and write; --batches
must be the same folder for gateways and producers. SIGTERM or SIGINT ends it between two steps;
killed, another goes on where it was.
"""

from __future__ import annotations

import argparse

from openlora.commands.config import process_environment
from producer.bulk.config import add_arguments, config_from

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Work until a signal; returns the exit status."""
    config = config_from(args, process_environment())
    from producer.bulk.main import run as run_producer

    return run_producer(config)
