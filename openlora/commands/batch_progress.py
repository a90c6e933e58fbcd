"""Live progress of a batch: lines, tokens per second, time left, adapters, failures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openlora.errors import Overloaded, SetupError

POLL_S = 0.5
PATIENCE_S = 60.0
"""A gateway that answers no more is waited for: it may be started anew."""
SHOWN_ADAPTERS = 8
_RATE_WINDOW = 20  # polls, about 10 s

OVER = ("completed", "failed", "cancelled", "expired")


class Rates:
    """Speeds over the last few polls."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque(maxlen=_RATE_WINDOW)

    def add(self, now_s: float, lines: int, tokens: int) -> None:
        """What was done at ``now_s``."""
        self._seen.append((now_s, lines, tokens))

    def per_second(self) -> tuple[float, float]:
        """(lines, tokens) per second."""
        if len(self._seen) < 2:
            return 0.0, 0.0
        (first_s, first_lines, first_tokens), (last_s, lines, tokens) = (
            self._seen[0],
            self._seen[-1],
        )
        elapsed = last_s - first_s
        if elapsed <= 0:
            return 0.0, 0.0
        return (lines - first_lines) / elapsed, (tokens - first_tokens) / elapsed


def watch(get: Callable[[str], Any], batch_id: str) -> dict[str, Any]:
    """Show the batch until it is over; → it. ``get``: JSON of a path of the running system.

    On a terminal the picture is renewed in place; elsewhere each new status is a line.

    Raises:
        SetupError: nothing answers, or nothing for ``PATIENCE_S`` any more.
    """
    console = Console(stderr=True, highlight=False)
    rates = Rates()
    last_status = ""
    batch: dict[str, Any] = get(f"/v1/batches/{batch_id}")
    get = _patient(get)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            progress = batch["progress"]
            rates.add(time.monotonic(), progress["lines_done"], progress["completion_tokens"])
            is_over = batch["status"] in OVER
            if console.is_terminal:
                adapters = get(f"/v1/batches/{batch_id}/adapters")
                live.update(picture(batch, adapters, rates), refresh=True)
            elif batch["status"] != last_status:
                console.print(summary(batch))
            last_status = batch["status"]
            if is_over:
                return batch
            time.sleep(POLL_S)
            batch = get(f"/v1/batches/{batch_id}")


def _patient(get: Callable[[str], Any]) -> Callable[[str], Any]:
    """``get``, asked again for ``PATIENCE_S`` where nothing answers, or Redis does not."""

    def ask(path: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return get(path)
            except (SetupError, Overloaded):
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    return ask


def summary(batch: Mapping[str, Any]) -> str:
    """One line: the status first."""
    counts, progress = batch["request_counts"], batch["progress"]
    words = [batch["status"], f"{progress['lines_done']}/{counts['total']} lines"]
    if counts["failed"]:
        words.append(f"{counts['failed']} failed")
    if progress["completion_tokens"]:
        words.append(f"{progress['completion_tokens']} tokens")
    if progress["problem"]:
        words.append(f"waiting: {progress['problem']}")
    return "  ".join(words)


def picture(batch: Mapping[str, Any], adapters: Mapping[str, int], rates: Rates) -> Group:
    """All of it."""
    counts, progress = batch["request_counts"], batch["progress"]
    total, done = counts["total"], progress["lines_done"]
    lines_s, tokens_s = rates.per_second()
    head = Text(f"{batch['id']}  {batch['status']}", style="bold")
    if batch["status"] == "validating":
        done, total = progress["bytes_read"], progress["bytes"]
    facts = [f"{progress['lines_done']:,} of {counts['total']:,} lines"]
    if lines_s:
        facts.append(f"{lines_s:,.0f} lines/s, {tokens_s:,.0f} tokens/s")
        facts.append(f"{_duration((counts['total'] - progress['lines_done']) / lines_s)} left")
    facts.append(f"{counts['failed']:,} failed")
    bar = ProgressBar(total=max(1, total), completed=done, width=60)
    parts: list[Any] = [head, Padding(bar, 0)]  # by itself it ends no line
    parts.append(Text(" · ".join(facts)))
    if progress["problem"]:
        parts.append(Text(f"waiting: {progress['problem']}", style="yellow"))
    if len(adapters) > 1 or any(adapters):
        parts.append(_adapter_table(adapters))
    return Group(*parts)


def _adapter_table(adapters: Mapping[str, int]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("adapter")
    table.add_column("lines done", justify="right")
    ranked = sorted(adapters.items(), key=lambda entry: (-entry[1], entry[0]))
    for name, lines in ranked[:SHOWN_ADAPTERS]:
        table.add_row(name or "(base model)", f"{lines:,}")
    if len(ranked) > SHOWN_ADAPTERS:
        rest = ranked[SHOWN_ADAPTERS:]
        table.add_row(f"{len(rest):,} more", f"{sum(lines for _, lines in rest):,}")
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
