"""Partitions of the job topics, which worker owns each, and how far behind it is.

examples:
  openlora topics
  openlora topics --all --json

Numbers come from the workers' heartbeats. lag: jobs of the partition that have not ended for
sure. A partition that nobody owns waits for a worker.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from openlora.commands.config import add_client_arguments, client_config, process_environment

if TYPE_CHECKING:
    from openlora.protocol.status import Heartbeat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora topics``."""
    parser.add_argument("--json", action="store_true", help="print every partition as JSON")
    parser.add_argument("--all", action="store_true", help="also partitions that never had a job")
    add_client_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print them; returns the exit status."""
    config = client_config(args, process_environment())
    import msgspec

    from openlora.commands.http_client import HttpClient
    from openlora.commands.tables import print_json, print_table
    from producer.topics import describe_partitions

    heartbeats = [_heartbeat(worker) for worker in HttpClient(config).get("/v1/workers")]
    rows = describe_partitions(_partition_counts(heartbeats), heartbeats)
    if args.json:
        print_json(msgspec.to_builtins(rows))
        return 0
    if not rows:
        print("no worker owns a partition; `openlora workers` shows who lives")
        return 0
    shown = [row for row in rows if args.all or row.high_water or not row.owners]
    if shown:
        print_table(
            ("topic", "partition", "owner", "committed", "position", "end", "lag", "state"),
            [
                (
                    row.topic,
                    row.partition,
                    ", ".join(row.owners) or None,
                    row.committed,
                    row.position,
                    row.high_water,
                    row.lag,
                    "paused" if row.paused else "flowing" if row.owners else "no owner",
                )
                for row in shown
            ],
        )
    owned = sum(bool(row.owners) for row in rows)
    lag = sum(row.lag or 0 for row in rows)
    print(
        f"{len(rows)} partitions, {owned} owned by {len(heartbeats)} worker(s), total lag {lag}"
        + (
            f"; {len(rows) - len(shown)} without a job are not shown (--all)"
            if shown != rows
            else ""
        )
    )
    return 0


def _heartbeat(worker: dict[str, Any]) -> Heartbeat:
    """An entry of ``/v1/workers`` as the heartbeat it came from."""
    import msgspec

    from openlora.protocol.status import Heartbeat

    return msgspec.convert({**worker, "model_id": worker["model"]}, Heartbeat)


def _partition_counts(heartbeats: Iterable[Heartbeat]) -> dict[str, int]:
    """Partitions by topic, as far as any worker owns one of the highest number."""
    counts: dict[str, int] = {}
    for heartbeat in heartbeats:
        for status in heartbeat.partitions:
            counts[status.topic] = max(counts.get(status.topic, 0), status.partition + 1)
    return counts
