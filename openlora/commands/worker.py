"""Run one worker: it takes jobs of its partitions from Kafka and streams tokens through Redis.

examples:
  openlora worker --model ./llama --kafka kafka:9092 --redis redis://redis:6379/0
  CUDA_VISIBLE_DEVICES=1 openlora worker --model ./llama --device cuda

Start as many as there are GPUs: they share the partitions. The adapter store (--store) must be
the same folder for gateways and workers. SIGTERM or SIGINT: running jobs get --drain-timeout-s
to end; what is left goes on at another worker with its next token.
"""

from __future__ import annotations

import argparse

from openlora.commands.config import process_environment
from workers.config import add_arguments, config_from

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Work until a signal; returns the exit status."""
    config = config_from(args, process_environment())
    from workers.main import run as run_worker

    return run_worker(config)
