"""The pipeline benchmark's tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from openlora.bench.pipeline import LoadRow, PipelineRow

GOAL_SHARE_OF_RELAY = 0.6
GOAL_LATENCY_P50_MS, GOAL_LATENCY_P99_MS = 5.0, 25.0
GOAL_ADDED_TTFT_P50_MS = 30.0


def print_table(row: PipelineRow) -> None:
    """The result beside its goals, and where the CPU went."""
    console = Console()
    table = Table("measured", "value", "goal", title=f"{row.streams} streams, {row.cores} cores")
    table.add_row("bare relay, tok/s", f"{row.relay_tok_s:,}", "")
    table.add_row("whole path, tok/s", f"{row.throughput_tok_s:,}", "")
    table.add_row(
        "share of bare relay", f"{row.share_of_relay:.0%}", f"≥ {GOAL_SHARE_OF_RELAY:.0%}"
    )
    for latency, where, goals in (
        (row.goal_latency, "half of the throughput's goal", True),
        (row.latency, "half of the throughput", False),
    ):
        table.add_section()
        offered = f"{latency.offered_tok_s:,} offered"
        table.add_row(f"at {where}, tok/s", f"{latency.tok_s:,}", offered)
        table.add_row(
            "emit → receive p50 / p99, ms",
            f"{latency.latency_p50_ms} / {latency.latency_p99_ms}",
            f"≤ {GOAL_LATENCY_P50_MS:g} / {GOAL_LATENCY_P99_MS:g}" if goals else "",
        )
        table.add_row(
            "added time to first token p50 / p99, ms",
            f"{latency.added_ttft_p50_ms} / {latency.added_ttft_p99_ms}",
            f"≤ {GOAL_ADDED_TTFT_P50_MS:g} / –" if goals else "",
        )
    console.print(table)
    processes = sorted({name for shares in row.cpu_share.values() for name in shares})
    latency = row.goal_latency
    cpu = Table("share of one core", *row.cpu_share, "µs per token (half the goal)")
    for process in processes:
        shares = (row.cpu_share[run].get(process) for run in row.cpu_share)
        cost = latency.cpu_us_per_token.get(process)
        cpu.add_row(
            process,
            *("" if share is None else f"{share:.0%}" for share in shares),
            "" if cost is None else f"{cost:g}",
        )
    console.print(cpu)


def print_loads(loads: Sequence[LoadRow]) -> None:
    """One row for each load of ``--loads``."""
    table = Table(
        *("path", "offered tok/s", "tok/s", "emit → receive p50 / p99, ms"),
        *("added TTFT p50 / p99, ms", "µs per token", "kept up"),
    )
    for load in loads:
        is_relay = load.path == "relay"
        table.add_row(
            load.path,
            f"{load.offered_tok_s:,}",
            f"{load.tok_s:,}",
            f"{load.latency_p50_ms} / {load.latency_p99_ms}",
            "" if is_relay else f"{load.added_ttft_p50_ms} / {load.added_ttft_p99_ms}",
            f"{sum(load.cpu_us_per_token.values()):.1f}",
            "yes" if load.kept_up else "no",
        )
    Console().print(table)
