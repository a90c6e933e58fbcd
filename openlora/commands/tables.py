"""How client commands print: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

Cell = str | int | float | None


def print_json(value: object) -> None:
    """``value`` as indented JSON on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A borderless table; numbers to the right, None as "–". Wide where there is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: lines must not be wrapped for one that rich assumes.
        console = Console(highlight=False, width=10_000)
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], (int, float, type(None))) for row in rows)
        table.add_column(column, justify="right" if rows and numbers else "left")
    for row in rows:
        table.add_row(*("–" if cell is None else str(cell) for cell in row))
    console.print(table)
