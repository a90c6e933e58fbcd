"""Requests over many adapters: how they are drawn, and what they see."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from openlora.engine import Engine, Request

POPULARITIES = ("distinct", "uniform", "zipf", "identical")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the requests of one case saw.

    ``placed``, ``read``: loads into pages, and from files.
    """

    out_tok_s: float
    ttft_s: tuple[float, ...]
    distinct_a_step: float
    placed: int
    read: int

    def ttft_ms(self, share: float) -> float:
        """The time to the first token that ``share`` of the requests do not exceed."""
        ordered = sorted(self.ttft_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Of several rounds: the median throughput, all first tokens, loads of a round."""
    return Outcome(
        median(outcome.out_tok_s for outcome in outcomes),
        tuple(ttft for outcome in outcomes for ttft in outcome.ttft_s),
        sum(outcome.distinct_a_step for outcome in outcomes) / len(outcomes),
        round(sum(outcome.placed for outcome in outcomes) / len(outcomes)),
        round(sum(outcome.read for outcome in outcomes) / len(outcomes)),
    )


def link_adapter(source: Path, directory: Path) -> None:
    """An adapter that takes no room on disk, and is another one all the same."""
    directory.mkdir(parents=True)
    for file in source.iterdir():
        os.link(file, directory / file.name)


def draw(popularity: str, count: int, requests: int, seed: int, apart: int = 0) -> list[int]:
    """The adapter of each request, a number below ``count``. Pure.

    ``apart``: an adapter is not drawn again before so many others, where there are as many.
    """
    if popularity == "identical":
        return [0] * requests
    if popularity == "distinct":
        return [number % count for number in range(requests)]
    weights = [1 / (number + 1) if popularity == "zipf" else 1.0 for number in range(count)]
    drawer, drawn = random.Random(seed), list[int]()
    apart = min(apart, count - 1)
    totals = list(itertools.accumulate(weights))
    while len(drawn) < requests:
        (number,) = drawer.choices(range(count), cum_weights=totals)
        if not apart or number not in drawn[-apart:]:
            drawn.append(number)
    return drawn


def staggered(requests: Sequence[Request], seed: int) -> list[Request]:
    """Answers of half to one and a half times the length, so that requests do not come and go in
    step: the first tokens of some meet the decoding of others, as in real traffic."""
    drawer = random.Random(seed)
    found = []
    for request in requests:
        length = request.params.max_tokens
        length = drawer.randint(max(1, length // 2), length + length // 2)
        found.append(replace(request, params=replace(request.params, max_tokens=length)))
    return found


def measure(engine: Engine, requests: Sequence[Request], concurrency: int) -> Outcome:
    """Keep ``concurrency`` requests under way until all have ended.

    Raises:
        OpenLoRAError: a request failed.
    """
    waiting = deque(requests)
    added_at: dict[int, float] = {}
    adapter_of: dict[int, frozenset[str]] = {}
    ttft_s: list[float] = []
    tokens = steps = distinct = 0
    before = _loads(engine)
    started = time.perf_counter()
    while waiting or added_at:
        while waiting and len(added_at) < concurrency:
            request = waiting.popleft()
            request_id = engine.add(request)
            added_at[request_id] = time.perf_counter()
            adapter_of[request_id] = frozenset(request.adapters)
        engine.wait_for_adapters(1.0)
        outputs = engine.step()
        steps += bool(outputs)
        distinct += len({adapter_of[output.request_id] for output in outputs})
        for output in outputs:
            if output.error is not None:
                raise output.error
            tokens += 1
            if output.index == 0:
                ttft_s.append(time.perf_counter() - added_at[output.request_id])
            if output.finish_reason is not None:
                del added_at[output.request_id]
    seconds = time.perf_counter() - started
    placed, read = (now - then for now, then in zip(_loads(engine), before, strict=True))
    return Outcome(tokens / seconds, tuple(ttft_s), distinct / max(1, steps), placed, read)


def _loads(engine: Engine) -> tuple[int, int]:
    """Loads into pages and from files so far."""
    loads = {tier.tier: tier.loads for tier in engine.stats().tiers}
    return loads["device"], loads.get("host", 0)
