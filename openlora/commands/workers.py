"""The live workers of a running system and what each of them does now.

examples:
  openlora workers
  openlora workers --json --url http://gateway:8000
"""

from __future__ import annotations

import argparse

from openlora.commands.config import add_client_arguments, client_config, process_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora workers``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_client_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print them; returns the exit status."""
    config = client_config(args, process_environment())
    from openlora.commands.http_client import HttpClient
    from openlora.commands.tables import print_json, print_table

    workers = HttpClient(config).get("/v1/workers")
    if args.json:
        print_json(workers)
        return 0
    if not workers:
        print("no worker is alive; start one with `openlora worker`")
        return 0
    print_table(
        ("id", "pid", "host", "device", "ready", "partitions", "running", "waiting", "adapters",
         "tok/s"),
        [
            (
                worker["id"],
                worker["pid"],
                worker["host"],
                worker["device"],
                "yes" if worker["ready"] else "no",
                len(worker["partitions"]),
                worker["running"],
                worker["waiting"],
                ", ".join(f"{tier['count']} {tier['tier']}" for tier in worker["tiers"]),
                round(worker["tokens_per_s"], 1),
            )
            for worker in workers
        ],
    )  # fmt: skip
    return 0
