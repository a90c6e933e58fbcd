"""Make an API key: it is printed once, and only its hash goes into the gateway's key file.

examples:
  openlora keys new --tenant acme
  openlora keys new --tenant acme --adapters 'pirate,acme-*' --per-minute 60 --file keys.json

The gateway reads the file that OPENLORA_API_KEYS_FILE names when it starts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from openlora.errors import SetupError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Subcommands of ``openlora keys``."""
    subparsers = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = subparsers.add_parser("new", help="make one")
    new.add_argument("--tenant", required=True, help="whose jobs and adapters it sees")
    new.add_argument("--adapters", metavar="A,B", help="patterns of adapters it may use (all)")
    new.add_argument("--per-minute", type=float, metavar="N", help="requests a minute (any number)")
    new.add_argument("--file", type=Path, help="the key file to add it to; else it is printed")


def run(args: argparse.Namespace) -> int:
    """Make it; returns the exit status."""
    key = f"ol-{secrets.token_urlsafe(32)}"
    entry: dict[str, Any] = {
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "tenant": args.tenant,
    }
    if args.adapters is not None:
        entry["adapters"] = [name for name in args.adapters.split(",") if name]
    if args.per_minute is not None:
        entry["per_minute"] = args.per_minute
    if args.file is None:
        print(json.dumps(entry))
    else:
        _add(args.file, entry)
        print(f"added to {args.file}; the gateway reads it at its next start")
    print(f"key, shown only now: {key}")
    return 0


def _add(path: Path, entry: dict[str, Any]) -> None:
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not isinstance(entries, list):
            raise SetupError(f"{path} is no key file: it must hold a JSON list")
        # Whole or not at all, and readable by its owner alone.
        new = path.with_name(path.name + ".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump([*entries, entry], file, indent=2)
            file.write("\n")
        new.replace(path)
    except (OSError, ValueError) as error:
        raise SetupError(f"the key file {path} cannot be changed: {error}") from error
