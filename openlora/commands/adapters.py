"""Add, list, show and remove the adapters of a running system.

examples:
  openlora adapters add poet ./poet-lora       a PEFT directory on the gateway's machine
  openlora adapters list
  openlora adapters show poet
  openlora adapters remove poet

Adding an ID that exists makes a new version; running requests keep the one they started with.
The API key is read from OPENLORA_API_KEY.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import quote

from openlora.commands.config import add_client_arguments, client_config, process_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora adapters``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="register a PEFT directory under an ID")
    add.add_argument("id", metavar="ID")
    add.add_argument("source", metavar="SOURCE", help="the adapter's directory")
    show = actions.add_parser("show", help="one adapter as JSON")
    show.add_argument("id", metavar="ID")
    remove = actions.add_parser("remove", help="forget an adapter")
    remove.add_argument("id", metavar="ID")
    listing = actions.add_parser("list", help="all adapters")
    listing.add_argument("--json", action="store_true", help="print JSON")
    for action in (add, show, remove, listing):
        add_client_arguments(action)


def run(args: argparse.Namespace) -> int:
    """Do the action; returns the exit status."""
    config = client_config(args, process_environment())
    from openlora.commands.http_client import HttpClient
    from openlora.commands.tables import print_json, print_table

    client = HttpClient(config)
    if args.action == "add":
        # The gateway does not know where this shell stands; what is no path here is sent as is.
        path = Path(args.source).expanduser()
        source = str(path.resolve()) if path.exists() else args.source
        record = client.post("/v1/adapters", {"id": args.id, "source": source})
        print(f"{record['id']} version {record['version']}: rank {record['rank']}")
    elif args.action == "remove":
        client.delete(_path(args.id))
        print(f"{args.id} removed")
    elif args.action == "show":
        print_json(client.get(_path(args.id)))
    else:
        records = client.get("/v1/adapters")
        if args.json:
            print_json(records)
            return 0
        print_table(
            ("id", "version", "rank", "targets", "MB", "hash"),
            [
                (
                    record["id"],
                    record["version"],
                    record["rank"],
                    ", ".join(record["targets"]),
                    round(record["size_bytes"] / 1e6, 1),
                    record["hash"][:12],
                )
                for record in records
            ],
        )
    return 0


def _path(adapter_id: str) -> str:
    return f"/v1/adapters/{quote(adapter_id, safe='')}"
