"""Partitions of the job topics, which worker owns each, and how far behind it is.

examples:
  openlora topics
  openlora topics --all --json
  openlora topics scale 64

Owners and numbers come from the workers' heartbeats. A partition that nobody owns waits for a
worker; its numbers are the broker's. lag: jobs of the partition that have not ended for sure.
scale adds partitions to the job topics, under running streams: an adapter's later requests may go
to another worker, whose first one loads it.
"""

from __future__ import annotations

import argparse

from openlora.commands.config import add_client_arguments, client_config, process_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora topics``."""
    subparsers = parser.add_subparsers(dest="action", metavar="ACTION")
    scale = subparsers.add_parser("scale", help="add partitions to the job topics")
    scale.add_argument("partitions", type=int, metavar="N", help="how many each is to have")
    # Not given twice: what stands before the word would be overwritten by the other's default.
    scale.add_argument("--url", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print every partition as JSON")
    parser.add_argument("--all", action="store_true", help="also partitions that never had a job")
    add_client_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print them; returns the exit status."""
    config = client_config(args, process_environment())
    import msgspec

    from openlora.commands.http_client import HttpClient
    from openlora.commands.tables import print_json, print_table
    from producer.topics import PartitionRow

    if args.action == "scale":
        counts = HttpClient(config).post("/v1/topics/scale", {"partitions": args.partitions})
        for topic, count in counts.items():
            print(f"{topic} has {count} partitions")
        return 0
    answer = HttpClient(config).get("/v1/topics")
    if args.json:
        print_json(answer)
        return 0
    rows = msgspec.convert(answer, list[PartitionRow])
    if not rows:
        print("the gateway has not reached Kafka yet; ask again, or see its log")
        return 0
    shown = [row for row in rows if args.all or row.high_water or not row.owners]
    if shown:
        print_table(
            ("topic", "partition", "owner", "committed", "position", "end", "lag", "state"),
            [
                (
                    row.topic,
                    row.partition,
                    ", ".join(row.owners) or "-",
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
    workers = len({owner for row in rows for owner in row.owners})
    lag = sum(row.lag or 0 for row in rows)
    print(
        f"{len(rows)} partitions, {owned} owned by {workers} worker(s), total lag {lag}"
        + (
            f"; {len(rows) - len(shown)} without a job are not shown (--all)"
            if shown != rows
            else ""
        )
    )
    return 0
