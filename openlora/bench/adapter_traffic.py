"""Requests over many adapters: how they are drawn, and what they see."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from openlora.bench.measure import make_requests
from openlora.engine import Engine, Request

POPULARITIES = ("distinct", "uniform", "zipf", "identical")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the requests of one case saw.

    ``placed``, ``read``, ``fetched``: loads into pages, into host memory, and from the store.
    """

    out_tok_s: float
    ttft_s: tuple[float, ...]
    distinct_a_step: float
    placed: int
    read: int
    fetched: int = 0

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
        round(sum(outcome.fetched for outcome in outcomes) / len(outcomes)),
    )


Plan = list[dict[tuple[int, str], list[int]]]
"""For each round, the adapters drawn for each case of (number of adapters, popularity)."""


def plan_of(
    cases: Sequence[tuple[int, str]], rounds: int, requests: int, seed: int, apart: int
) -> Plan:
    """What is drawn, each round by a seed of its own. Pure."""
    return [
        {case: draw(case[1], case[0], requests, seed + number, apart) for case in cases}
        for number in range(rounds)
    ]


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


def warm_up(engine: Engine, seats: int, prompt: int, adapters: Sequence[str]) -> None:
    """Steps of every size, without adapters, with one, and with many: kernels are compiled and
    graphs captured in them."""
    for names in ([], adapters[:1], list(adapters)):
        requests = make_requests(
            seats,
            names,
            prompt_tokens=prompt,
            output_tokens=1,
            vocab_size=engine.model_info.vocab_size,
            seed=0,
        )
        # One ends in each step.
        requests = [
            replace(request, params=replace(request.params, max_tokens=number))
            for number, request in enumerate(requests, 2)
        ]
        measure(engine, requests, seats)


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
    loads = [now - then for now, then in zip(_loads(engine), before, strict=True)]
    return Outcome(tokens / seconds, tuple(ttft_s), distinct / max(1, steps), *loads)


def _loads(engine: Engine) -> list[int]:
    """Loads into each tier so far."""
    loads = {tier.tier: tier.loads for tier in engine.stats().tiers}
    return [loads.get(tier, 0) for tier in ("device", "host", "disk")]
