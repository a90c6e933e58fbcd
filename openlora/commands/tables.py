"""How client commands print: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_FITTED_ROWS = 500
"""With more, rich takes a millisecond a row."""

Cell = str | int | float | None


def print_json(value: object) -> None:
    """``value`` as indented JSON on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A borderless table; numbers to the right, None as "–". Wide where there is no terminal, or
    where it would take rich seconds to fit the table into one."""
    is_right = [bool(rows) and all(map(_is_number, column)) for column in zip(*rows, strict=True)]
    is_right = is_right or [False] * len(columns)
    cells = [["–" if cell is None else str(cell) for cell in row] for row in rows]
    console = Console(highlight=False)
    if not console.is_terminal or len(rows) > MAX_FITTED_ROWS:
        sys.stdout.writelines(_plain_lines([list(columns), *cells], is_right))
        return
    table = Table(box=None, pad_edge=False)
    for column, right in zip(columns, is_right, strict=True):
        table.add_column(column, justify="right" if right else "left")
    for row in cells:
        # As text: what a cell has in brackets is no markup.
        table.add_row(*map(Text, row))
    console.print(table)


def _is_number(cell: Cell) -> bool:
    return cell is None or isinstance(cell, (int, float))


def _plain_lines(lines: Sequence[Sequence[str]], is_right: Sequence[bool]) -> Iterator[str]:
    """The same layout, each line as long as it is."""
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = []
        for cell, width, right in zip(line, widths, is_right, strict=True):
            pad = " " * (width - cell_len(cell))
            padded.append(pad + cell if right else cell + pad)
        yield "  ".join(padded).rstrip() + "\n"
