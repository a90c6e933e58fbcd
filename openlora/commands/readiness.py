"""What a gateway's ``/readyz`` says, and how the wait for it is shown."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from openlora.commands.screen import Screen
from openlora.errors import SetupError

QUARTER = 0.25


@dataclass(frozen=True, slots=True)
class Readiness:
    """``answers``: the gateway does at all. ``loaded``: worker's process ID → share of its model
    that is loaded, of the workers that start."""

    answers: bool = False
    waiting_for: tuple[str, ...] = ()
    loaded: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered."""
        return self.answers and not self.waiting_for


def read_readiness(url: str) -> Readiness:
    """Ask the gateway at ``url`` (no trailing slash).

    Raises:
        SetupError: something answers that is no gateway.
    """
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return Readiness()
    finally:
        connection.close()
    try:
        fields = json.loads(body)
        return Readiness(
            True,
            tuple(str(name) for name in fields["waiting_for"]),
            {int(w["pid"]): float(w["loaded"]) for w in fields.get("starting", ())},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f"{url} answers, but not as an OpenLoRA gateway (status {response.status}); "
            "another program uses the port"
        ) from error


class LoadView(Protocol):
    """Shows how far the workers are."""

    def show(self, loaded: Mapping[str, float], waiting_for: Sequence[str]) -> None:
        """``loaded``: name → share of the model in memory; a name that lacks has not begun."""


@contextmanager
def load_view(screen: Screen, names: Sequence[str]) -> Iterator[LoadView]:
    """A bar for each of ``names`` on a terminal; elsewhere a line for each quarter."""
    if not screen.live:
        yield PlainLoadView(screen, names)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Elapsed())
    with Progress(*columns, console=screen.console, transient=True) as progress:
        yield _Bars(progress, names)


class PlainLoadView:
    """Lines for a log: each says something new."""

    def __init__(self, screen: Screen, names: Sequence[str]) -> None:
        self._screen = screen
        self._quarters = dict.fromkeys(names, -1)
        self._last = ""

    def show(self, loaded: Mapping[str, float], waiting_for: Sequence[str]) -> None:
        """A line where a worker came a quarter further, or something else is waited for."""
        for name, share in loaded.items():
            quarter = int(share / QUARTER)
            if quarter > self._quarters.get(name, -1):
                self._quarters[name] = quarter
                self._screen.line(f"Loading the model: {name} {quarter * QUARTER:.0%}")
        what = ", ".join(waiting_for)
        if what and what != self._last:
            self._last = what
            self._screen.line(f"Waiting for {what}")


class _Bars:
    def __init__(self, progress: Progress, names: Sequence[str]) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {
            name: progress.add_task(f"Loading the model: {name} starts", total=None)
            for name in names
        }

    def show(self, loaded: Mapping[str, float], waiting_for: Sequence[str]) -> None:
        for name, share in loaded.items():
            what = "loads" if share < 1 else "joins the others"
            self._progress.update(
                self._tasks[name],
                description=f"Loading the model: {name} {what}",
                total=1.0,
                completed=share,
            )
