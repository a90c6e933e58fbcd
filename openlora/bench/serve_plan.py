"""What ``bench serve`` asks, and the row that it makes of what came back. Pure."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from openlora.bench.pipeline_plan import percentile

POPULARITIES = ("uniform", "zipf")


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: ``at_s`` behind the start, or as soon as a client is free (None)."""

    prompt: str
    adapter: str | None
    at_s: float | None = None


@dataclass(slots=True)
class Seen:
    """What came back: times in ms, errors by their codes."""

    first_ms: list[float] = field(default_factory=list)
    gap_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class ServeRow(msgspec.Struct, frozen=True):
    """One line of ``--out``. ``rate``: requests asked for a second; None: as clients are free."""

    case: str
    url: str
    streams: int
    requests: int
    failed: int
    adapters: int
    popularity: str
    rate: float | None
    output: int
    seconds: float
    out_tok_s: float
    requests_s: float
    prompt_tokens: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    gap_ms_p50: float
    gap_ms_p99: float
    total_ms_p50: float
    total_ms_p99: float
    errors: dict[str, int]


def make_plan(
    requests: int,
    adapters: Sequence[str | None],
    popularity: str,
    rate: float | None,
    prompt_chars: int,
    seed: int,
) -> list[Planned]:
    """What is asked, in order. Pure.

    Args:
        adapters: None is the base model; by "zipf" the n-th is asked 1/n as often as the first.
        rate: requests a second, with exponential pauses between them.
    """
    drawer = random.Random(seed)
    weights = [1 / (n + 1) if popularity == "zipf" else 1.0 for n in range(len(adapters))]
    plan, at_s = [], 0.0
    for number in range(requests):
        (adapter,) = drawer.choices(adapters, weights)
        text = f"{seed * requests + number}: tell what happened on that day of the voyage. "
        filling = "The wind was fair and the sea was calm. " * (prompt_chars // 40 + 1)
        at_s += drawer.expovariate(rate) if rate else 0.0
        plan.append(
            Planned((text + filling)[: max(prompt_chars, 1)], adapter, at_s if rate else None)
        )
    return plan


def row_of(
    args: argparse.Namespace, url: str, adapters: int, requests: int, seconds: float, seen: Seen
) -> ServeRow:
    """The row of a run. Pure."""

    def at(values: list[float], share: float) -> float:
        return round(percentile(values, share), 2) if values else 0.0

    done = len(seen.total_ms)
    return ServeRow(
        case="serve",
        url=url,
        streams=args.streams,
        requests=requests,
        failed=seen.errors.total(),
        adapters=adapters,
        popularity=args.popularity,
        rate=args.rate,
        output=args.output,
        seconds=round(seconds, 3),
        out_tok_s=round(seen.output_tokens / seconds, 1),
        requests_s=round(done / seconds, 2),
        prompt_tokens=round(seen.prompt_tokens / max(done, 1), 1),
        ttft_ms_p50=at(seen.first_ms, 0.5),
        ttft_ms_p99=at(seen.first_ms, 0.99),
        gap_ms_p50=at(seen.gap_ms, 0.5),
        gap_ms_p99=at(seen.gap_ms, 0.99),
        total_ms_p50=at(seen.total_ms, 0.5),
        total_ms_p99=at(seen.total_ms, 0.99),
        errors=dict(seen.errors),
    )
