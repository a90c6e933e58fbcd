"""Tables of the command line."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from openlora.commands import tables
from openlora.commands.tables import MAX_FITTED_ROWS, print_table

COLUMNS = ("id", "version", "size")


def test_a_pipe_gets_each_row_in_a_line(capsys):
    print_table(COLUMNS, [("poet", 2, None), ("a[/b]" * 40, 10, 1.5), ("詩人", 3, 0.5)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["id", "version", "size"],
        ["poet", "2", "–"],
        ["a[/b]" * 40, "10", "1.5"],
        ["詩人", "3", "0.5"],
    ]
    assert lines[1].index("2") == lines[2].index("10") + 1
    assert lines[3].index("3") == lines[1].index("2") - 2, "these letters are two wide"


def test_nothing_to_list_is_a_header(capsys):
    print_table(COLUMNS, [])
    assert capsys.readouterr().out.split() == ["id", "version", "size"]


@pytest.mark.parametrize("count", [1, MAX_FITTED_ROWS + 1])
def test_a_terminal_shows_brackets_as_they_are(monkeypatch, capsys, count):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=60)
    monkeypatch.setattr(tables, "Console", lambda **_: terminal)
    print_table(COLUMNS, [("[bold]x[/]", 1, 1)] * count)
    shown = screen.getvalue() + capsys.readouterr().out
    assert shown.count("[bold]x[/]") == count


def test_ten_thousand_rows_take_no_time(capsys):
    began_s = time.process_time()
    print_table(COLUMNS, [(f"adapter-{number}", number, None) for number in range(10_000)])
    assert time.process_time() - began_s < 1
