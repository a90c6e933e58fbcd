"""Run a file of requests offline and get every answer exactly once, in the file's order.

examples:
  openlora batch submit requests.jsonl --adapter pirate --wait
  openlora batch submit prompts.csv --column question
  openlora batch status batch_4f…
  openlora batch results batch_4f… -o answers.jsonl
  openlora batch cancel batch_4f…
  openlora batch list

A line is an OpenAI batch request (custom_id, method, url, body) or a short one:
{"prompt": "…", "adapter": "pirate", "max_tokens": 64}, with "messages" in place of "prompt" for a
chat. FILE may be a path, a URL that fsspec opens (s3://…), or - for standard input; .csv and
.parquet are read by column. The API key is read from OPENLORA_API_KEY.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from openlora.commands.config import add_client_arguments, client_config, process_environment
from openlora.errors import InternalError, InvalidRequest

if TYPE_CHECKING:
    from openlora.commands.http_client import HttpClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora batch``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    submit = actions.add_parser("submit", help="send a file and run its lines")
    submit.add_argument("file", metavar="FILE", help="path, URL or -")
    submit.add_argument("--adapter", metavar="ID", help="for lines that name none")
    submit.add_argument(
        "--column", default="prompt", metavar="C", help="of CSV and Parquet: the prompt's column"
    )
    submit.add_argument(
        "--window", default="24h", metavar="T", help="time after which the rest is given up (24h)"
    )
    submit.add_argument("--wait", action="store_true", help="show progress until it is over")
    status = actions.add_parser("status", help="how far a batch is")
    status.add_argument("id", metavar="ID")
    status.add_argument("--watch", action="store_true", help="show progress until it is over")
    status.add_argument("--json", action="store_true", help="print JSON")
    results = actions.add_parser("results", help="answers and errors, in the input's order")
    results.add_argument("id", metavar="ID")
    results.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    cancel = actions.add_parser("cancel", help="end a batch early; what is done stays")
    cancel.add_argument("id", metavar="ID")
    listing = actions.add_parser("list", help="the newest batches")
    listing.add_argument("--json", action="store_true", help="print JSON")
    for action in (submit, status, results, cancel, listing):
        add_client_arguments(action)


def run(args: argparse.Namespace) -> int:
    """Do the action; returns the exit status: 1 where a batch that was waited for fell short."""
    config = client_config(args, process_environment())
    from openlora.commands.http_client import HttpClient

    client = HttpClient(config)
    actions = {
        "submit": _submit,
        "status": _status,
        "results": _results,
        "cancel": _cancel,
        "list": _list,
    }
    return actions[args.action](client, args)


def _submit(client: HttpClient, args: argparse.Namespace) -> int:
    from openlora.commands.batch_input import open_input
    from openlora.commands.batch_progress import watch

    with open_input(args.file, args.column) as source:
        file = client.upload("/v1/files", source, source.name, {"purpose": "batch"})
        if file["sha256"] != source.sha256:
            client.delete(f"/v1/files/{file['id']}")
            raise InternalError(f"{args.file} did not arrive as it was sent; submit it again")
    new = {"input_file_id": file["id"], "completion_window": args.window, "adapter": args.adapter}
    batch = client.post("/v1/batches", new)
    print(batch["id"], flush=True)
    return _verdict(watch(client.get, batch["id"])) if args.wait else 0


def _status(client: HttpClient, args: argparse.Namespace) -> int:
    from openlora.commands.batch_progress import summary, watch
    from openlora.commands.tables import print_json

    if args.watch:
        return _verdict(watch(client.get, args.id))
    batch = client.get(_path(args.id))
    if args.json:
        print_json(batch)
        return 0
    print(summary(batch))
    for error in (batch["errors"] or {"data": []})["data"]:
        where = f"line {error['line']}: " if error["line"] is not None else ""
        print(f"  {where}{error['code']}: {error['message']}")
    return 0


def _results(client: HttpClient, args: argparse.Namespace) -> int:
    parts = client.download(f"{_path(args.id)}/results")
    if args.output in (None, "-"):
        for part in parts:
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        return 0
    path = Path(args.output).expanduser()
    unfinished = path.with_name(path.name + ".part")
    lines = 0
    try:
        with unfinished.open("wb") as file:
            for part in parts:
                file.write(part)
                lines += part.count(b"\n")
            file.flush()
        unfinished.replace(path)
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be written beyond line {lines}: {error.strerror}; the results stay "
            "where they are, so make room and ask again"
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    print(f"{lines} lines in {path}")
    return 0


def _cancel(client: HttpClient, args: argparse.Namespace) -> int:
    batch = client.post(f"{_path(args.id)}/cancel", {})
    print(batch["status"])
    return 0


def _list(client: HttpClient, args: argparse.Namespace) -> int:
    from openlora.commands.tables import print_json, print_table

    batches: list[dict[str, Any]] = client.get("/v1/batches?limit=50")["data"]
    if args.json:
        print_json(batches)
        return 0
    print_table(
        ("id", "status", "lines", "done", "failed", "tokens"),
        [
            (
                batch["id"],
                batch["status"],
                batch["request_counts"]["total"],
                batch["progress"]["lines_done"],
                batch["request_counts"]["failed"],
                batch["progress"]["completion_tokens"],
            )
            for batch in batches
        ],
    )
    return 0


def _verdict(batch: dict[str, Any]) -> int:
    return 0 if batch["status"] == "completed" else 1


def _path(batch_id: str) -> str:
    return f"/v1/batches/{quote(batch_id, safe='')}"
