"""What ``openlora up`` shows: short lines, live progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

Report = Callable[[str, float], None]
"""Called with what is being done and the share done, 0 to 1."""


class Screen:
    """Standard output of a command that runs long; ``live`` where it is a terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.live = self.console.is_terminal

    def line(self, text: str = "") -> None:
        """One line, as it is."""
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that should be seen."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A small table."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    @contextmanager
    def progress(self, title: str) -> Iterator[Report]:
        """A bar for work whose share done is known; each new stage is a line off a terminal."""
        if not self.live:
            yield self._plain_report(title)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=1.0)
            yield lambda stage, share: progress.update(
                task, description=f"{title}: {stage}", completed=share
            )

    def _plain_report(self, title: str) -> Report:
        last = ""

        def report(stage: str, share: float) -> None:
            nonlocal last
            if stage != last:
                self.line(f"{title}: {stage}")
                last = stage

        return report


class LogFollower:
    """Prints what is new in the children's log files, each line with its process's name."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._logs: list[tuple[str, Path]] = []
        self._offsets: dict[Path, int] = {}

    def add(self, name: str, path: Path) -> None:
        """Follow one more file from its start; it need not exist yet."""
        self._logs.append((name, path))
        self._offsets[path] = 0

    def show_new(self) -> None:
        """Print the whole lines written since the last call."""
        for name, path in self._logs:
            if not path.exists():
                continue
            with path.open("rb") as log:
                if log.seek(0, os.SEEK_END) < self._offsets[path]:
                    self._offsets[path] = 0  # a server that starts again truncates its log
                log.seek(self._offsets[path])
                data = log.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[path] += len(whole)
            for line in whole.decode("utf-8", "replace").splitlines():
                self._screen.line(f"[{name}] {line}")
