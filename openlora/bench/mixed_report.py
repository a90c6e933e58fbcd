"""The row and the table of ``bench mixed``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

GOAL_SHARE = 0.95


class MixedRow(msgspec.Struct, frozen=True):
    """One line of ``--out``. Rates are medians of the rounds, which are listed as well; shares are
    of those medians. ``batch_cores``: what each process took during the batch alone."""

    model: str
    device: str
    cores: int
    adapters: int
    lines: int
    tokens: int
    prompt_tokens: float
    engine_tok_s: float
    batch_tok_s: float
    share_of_engine: float
    engine_rounds: list[float]
    batch_rounds: list[float]
    streams: int
    stream_tokens: int
    engine_streams_tok_s: float
    streams_tok_s: float
    streams_share_of_engine: float
    engine_streams_rounds: list[float]
    streams_rounds: list[float]
    first_empty_p50_ms: float
    first_empty_p99_ms: float
    first_batch_p50_ms: float
    first_batch_p99_ms: float
    step_ms: float
    batch_cores: dict[str, float]
    case: str = "mixed"


def median(values: Sequence[float]) -> float:
    """Of the rounds."""
    return statistics.median(values)


def print_round(number: int, engine_tok_s: float, batch_tok_s: float) -> None:
    """What a round gave, while the others are still to come."""
    Console(highlight=False, stderr=True).print(
        f"round {number}: bare engine {engine_tok_s:,.0f} tok/s, batch {batch_tok_s:,.0f}"
    )


def print_table(row: MixedRow) -> None:
    """What was measured beside what is aimed at."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "measured", "rounds", "goal"):
        table.add_column(column, justify="left" if not column else "right")

    def add(name: str, value: str, goal: str = "", rounds: Sequence[float] = ()) -> None:
        table.add_row(name, value, " ".join(f"{rate:,.0f}" for rate in rounds), goal)

    goal = f"≥ {GOAL_SHARE:.0%}"
    add("bare engine, a batch's lines, tok/s", f"{row.engine_tok_s:,.0f}", "", row.engine_rounds)
    add("batch through the system, tok/s", f"{row.batch_tok_s:,.0f}", "", row.batch_rounds)
    add("share of the engine", f"{row.share_of_engine:.1%}", goal)
    for role, cores in row.batch_cores.items():
        add(f"{role} during the batch, cores", f"{cores:.2f}")
    if row.streams:
        bare, seen = row.engine_streams_tok_s, row.streams_tok_s
        add(
            f"bare engine, {row.streams} requests, tok/s",
            f"{bare:,.0f}",
            "",
            row.engine_streams_rounds,
        )
        add(f"{row.streams} websocket streams, tok/s", f"{seen:,.0f}", "", row.streams_rounds)
        add("share of the engine", f"{row.streams_share_of_engine:.1%}", goal)
    add("engine step beside a batch, ms", f"{row.step_ms:,.1f}")
    for name, empty, busy, steps in (
        ("p50", row.first_empty_p50_ms, row.first_batch_p50_ms, 1),
        ("p99", row.first_empty_p99_ms, row.first_batch_p99_ms, 2),
    ):
        add(f"first token {name}, empty system, ms", f"{empty:,.1f}")
        most = f"≤ {empty + steps * row.step_ms:,.1f}"
        add(f"first token {name}, beside a batch, ms", f"{busy:,.1f}", most)
    Console(highlight=False).print(table)
