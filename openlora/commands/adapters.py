"""Add, list, show, pin, roll back and remove adapters of a running system.

examples:
  openlora adapters add poet ./loras/poet          a PEFT directory on the gateway's machine
  openlora adapters add poet hf://acme/poet@main   from the hub; also https://, s3://…, and .zip
  openlora adapters list --search llama            what can be used, and where each lives now
  openlora adapters show poet@2                    one version
  openlora adapters versions poet                  all kept versions
  openlora adapters rollback poet                  the version before; `rollback poet 2` for that
  openlora adapters pin poet                       keep it in all workers' memory; `unpin poet`
  openlora adapters remove poet                    with all its versions; `poet@1` for that one

Adding an ID that exists makes a new version; running requests keep the one they started with, and
a request may pin one as ID@VERSION. The API key is read from OPENLORA_API_KEY.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from openlora.commands.config import add_client_arguments, client_config, process_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora adapters``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="register a PEFT adapter under an ID")
    add.add_argument("id", metavar="ID")
    add.add_argument(
        "source", metavar="SOURCE", help="its directory, or a URL: hf://, https://, s3://"
    )
    add.add_argument(
        "--visibility",
        choices=("public", "private"),
        help="who may use it (default: private for keys of a tenant, else public)",
    )
    add.add_argument("--licence", default="", metavar="NAME", help="kept with it, e.g. Apache-2.0")
    show = actions.add_parser("show", help="one adapter as JSON")
    versions = actions.add_parser("versions", help="all kept versions of an adapter")
    rollback = actions.add_parser("rollback", help="use an earlier version")
    remove = actions.add_parser("remove", help="forget an adapter, or one version")
    pin = actions.add_parser("pin", help="load an adapter ahead and never evict it")
    unpin = actions.add_parser("unpin", help="evict it like any other again")
    named = [(show, "ID[@V]"), (versions, "ID"), (rollback, "ID"), (remove, "ID[@V]")]
    for action, name in (*named, (pin, "ID"), (unpin, "ID")):
        action.add_argument("id", metavar=name)
    for action in (pin, unpin):
        action.add_argument("--tenant", metavar="T", help="whose private adapter is meant")
    rollback.add_argument(
        "version", type=int, nargs="?", metavar="VERSION", help="default: the one before"
    )
    listing = actions.add_parser("list", help="all adapters, and where each is resident")
    listing.add_argument("--search", default="", metavar="TEXT", help="part of an ID or base model")
    listing.add_argument("--limit", type=int, metavar="N", help="at most so many, 1 to 1000")
    listing.add_argument("--after", default="", metavar="ID", help="only those behind this ID")
    for action in (listing, versions):
        action.add_argument("--json", action="store_true", help="print JSON")
    for action in (add, show, versions, rollback, remove, pin, unpin, listing):
        add_client_arguments(action)


def run(args: argparse.Namespace) -> int:
    """Do the action; returns the exit status."""
    config = client_config(args, process_environment())
    from openlora.commands.http_client import ADD_TIMEOUT_S, HttpClient
    from openlora.commands.tables import print_json

    client = HttpClient(config)
    if args.action == "add":
        record = client.post("/v1/adapters", _new_adapter(args), ADD_TIMEOUT_S)
        print(f"{record['id']} version {record['version']}: rank {record['rank']}")
    elif args.action == "remove":
        client.delete(_path(args.id))
        print(f"{args.id} removed")
    elif args.action == "rollback":
        body = {} if args.version is None else {"version": args.version}
        record = client.post(f"{_path(args.id)}/rollback", body)
        print(f"{record['id']} version {record['version']} is in use")
    elif args.action in ("pin", "unpin"):
        path = f"{_path(args.id)}/pin"
        path += f"?{urlencode({'tenant': args.tenant})}" if args.tenant else ""
        record = client.post(path, {}) if args.action == "pin" else client.delete(path)
        state = "is pinned" if record["pinned"] else "is pinned no more"
        print(f"{record['id']} version {record['version']} {state}")
    elif args.action == "show":
        print_json(client.get(_path(args.id)))
    else:
        records = client.get(
            f"{_path(args.id)}/versions" if args.action == "versions" else _list_path(args)
        )
        if args.json:
            print_json(records)
        else:
            _print_records(records)
    return 0


def _new_adapter(args: argparse.Namespace) -> dict[str, str]:
    # The gateway does not know where this shell stands; what is no path here is sent as is.
    path = Path(args.source).expanduser()
    body = {"id": args.id, "source": str(path.resolve()) if path.exists() else args.source}
    if args.visibility:
        body["visibility"] = args.visibility
    if args.licence:
        body["licence"] = args.licence
    return body


def _list_path(args: argparse.Namespace) -> str:
    query = {"search": args.search, "limit": args.limit, "after": args.after}
    set_ones = {name: value for name, value in query.items() if value not in ("", None)}
    return f"/v1/adapters?{urlencode(set_ones)}" if set_ones else "/v1/adapters"


def _print_records(records: list[dict[str, Any]]) -> None:
    from openlora.commands.tables import print_table

    print_table(
        ("id", "version", "rank", "targets", "MB", "owner", "lives in", "hash"),
        [
            (
                record["id"],
                record["version"],
                record["rank"],
                ", ".join(record["targets"]),
                round(record["size_bytes"] / 1e6, 1),
                record["owner"] + (" (private)" if record["visibility"] == "private" else ""),
                _places(record),
                record["hash"][:12],
            )
            for record in records
        ],
    )


def _places(record: dict[str, Any]) -> str:
    """The fastest tier of each worker that has it, e.g. "device: a, b; disk: c"; else the store."""
    seen: set[str] = set()
    parts = []
    for tier in ("device", "host", "disk"):
        workers = [worker for worker in record["tiers"].get(tier, []) if worker not in seen]
        seen.update(workers)
        if workers:
            parts.append(f"{tier}: {', '.join(workers)}")
    return ("; ".join(parts) or "store") + (" (pinned)" if record["pinned"] else "")


def _path(adapter_id: str) -> str:
    return f"/v1/adapters/{quote(adapter_id, safe='')}"
