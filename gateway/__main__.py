"""``python -m gateway``: flags and environment → config → run."""

from __future__ import annotations

import argparse
import os
import sys

from gateway.config import add_arguments, config_from
from gateway.main import run
from openlora.errors import SetupError


def main() -> int:
    """Runs the gateway; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gateway", description="OpenLoRA's gateway.")
    add_arguments(parser)
    try:
        return run(config_from(parser.parse_args(), os.environ))
    except SetupError as error:
        print(f"gateway: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
