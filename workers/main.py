"""Entry of a worker process."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from openlora.errors import SetupError
from workers.config import WorkerConfig, add_arguments, config_from

SWITCH_INTERVAL_S = 0.0005
"""How long another thread may hold the interpreter while the loop waits for it."""


def run(config: WorkerConfig) -> int:
    """Work until SIGTERM or SIGINT; the exit status. Raises SetupError when it cannot start."""
    from workers.lifecycle import Worker

    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    # kafka-python speaks of every attempt to connect; what matters is said by workers.consumer.
    if logging.getLogger().level > logging.INFO:
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
    # The consumer's thread works in Python too: by default it may keep the loop, which comes back
    # from Redis several times a step, waiting for 5 ms each time.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return Worker(config).run()


def main() -> int:
    """``python -m workers``."""
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    add_arguments(parser)
    try:
        return run(config_from(parser.parse_args(), os.environ))
    except SetupError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
