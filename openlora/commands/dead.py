"""Messages that could not be run, and jobs that are not run again: why, and once more.

examples:
  openlora dead list
  openlora dead show 3
  openlora dead retry 3

A job comes here where it failed, or where it ended the engine twice when nothing else ran, as a
line of a batch does; its story names each crash. retry accepts it as a new job: resume it by the ID
that is printed. Lines are shown to the operator alone.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from openlora.commands.config import add_client_arguments, client_config, process_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Subcommands of ``openlora dead``."""
    subparsers = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("list", "all of them, oldest first"),
        ("show", "one with its story and its message"),
        ("retry", "accept the job once more"),
    ):
        subparser = subparsers.add_parser(name, help=text)
        if name != "list":
            subparser.add_argument("number", type=int, metavar="N", help="as `list` shows it")
        if name != "retry":
            subparser.add_argument("--json", action="store_true", help="print JSON")
        add_client_arguments(subparser)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit status."""
    config = client_config(args, process_environment())
    from openlora.commands.http_client import HttpClient
    from openlora.commands.tables import print_json

    client = HttpClient(config)
    if args.action == "retry":
        job_id = client.post(f"/v1/dead/{args.number}/retry", {})["job_id"]
        print(f"letter {args.number} was accepted again as job {job_id}")
        return 0
    if args.action == "show":
        letter = client.get(f"/v1/dead/{args.number}")
        if args.json:
            print_json(letter)
        else:
            _show(letter)
        return 0
    letters = client.get("/v1/dead")
    if args.json:
        print_json(letters)
    else:
        _list(letters)
    return 0


def _list(letters: list[dict[str, Any]]) -> None:
    from openlora.commands.tables import print_table

    if not letters:
        print("nothing is dead")
        return
    print_table(
        ("number", "written", "job", "code", "crashes", "reason"),
        [
            (
                letter["number"],
                _when(letter["written_ms"]),
                letter["job_id"] or "-",
                letter["code"],
                len(letter["story"]),
                letter["reason"],
            )
            for letter in letters
        ],
    )


def _show(letter: dict[str, Any]) -> None:
    from openlora.commands.tables import print_json

    print(f"letter {letter['number']}: {letter['code']}: {letter['reason']}")
    place = f"{letter['topic']} {letter['partition']} @ {letter['offset']}"
    print(f"written {_when(letter['written_ms'])} by {letter['worker_id']}, from {place}")
    for crash in letter["story"]:
        others = crash["jobs"] - 1
        company = f"with {others} others" if others else "alone"
        print(f"{_when(crash['at_ms'])}  {crash['how']} at {crash['worker_id']}, {company}")
    print()
    if "job" in letter:
        print_json(letter["job"])
    else:
        print(f"{letter['value_bytes']} bytes, in base64: {letter['value']}")


def _when(unix_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_ms / 1000))
