"""``bench decode --loads``: what a load costs its own request, and the batch running beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from openlora.engine import Engine, Request, SamplingParams

_GAP_STEPS = 20
_PROBES = 8


@dataclass(frozen=True, slots=True)
class _Measured:
    """Of a running batch with a request of one token every ``_GAP_STEPS`` steps."""

    step_ms: float
    ttft_ms: float


def measure_loads(
    engine: Engine, shape: str, running: Sequence[str], others: Sequence[str]
) -> dict[str, object]:
    """A row: requests whose adapter is resident, in host memory, or in files, beside a batch.

    Args:
        shape: of the model, for the row.
        running: adapters of the batch, one request each; all but one of those that fit the pages.
        others: as many adapters as ``needed_adapters`` says; not loaded yet.
    """
    host = others[:2]
    files = others[2:]
    _settle(engine, [*running, *host])
    beside = {
        "resident": _beside(engine, running, [host[1]] * _PROBES),
        "host": _beside(engine, running, [*host] * (_PROBES // 2)),
        "files": _beside(engine, running, files),
    }
    # One more than the pages hold, in turn: each one's pages have just gone to another.
    cycle = [*running, *host]
    _alone(engine, cycle)
    alone_host_ms = _alone(engine, cycle)
    alone_resident_ms = _alone(engine, [host[1]] * _PROBES)
    row: dict[str, object] = {"case": "loads", "model": shape, "batch": len(running)}
    for kind, measured in beside.items():
        row[f"{kind}_step_ms"] = measured.step_ms
        row[f"{kind}_ttft_ms"] = measured.ttft_ms
    base = beside["resident"]
    for kind in ("host", "files"):
        row[f"{kind}_slowdown"] = beside[kind].step_ms / base.step_ms - 1
    row["host_added_ttft_ms"] = beside["host"].ttft_ms - base.ttft_ms
    row["host_added_ttft_alone_ms"] = alone_host_ms - alone_resident_ms
    return row


def needed_adapters(gpu_adapters: int) -> int:
    """Adapters that ``measure_loads`` needs for an engine with pages for so many."""
    return gpu_adapters - 1 + 2 + _PROBES


def _request(adapter: str, num_tokens: int) -> Request:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, seed=0)
    # Short prompts: what is measured is the load, not the prefill beside it.
    return Request(prompt_token_ids=[5, 6, 7, 8], adapters={adapter: 1.0}, params=params)


def _settle(engine: Engine, adapters: Sequence[str]) -> None:
    """Load all, compile and capture what the measured runs need."""
    for adapter in adapters:
        _alone(engine, [adapter])
    _beside(engine, adapters[:-2], [adapters[-1]] * 2)


def _alone(engine: Engine, adapters: Sequence[str]) -> float:
    """Median time to the first token of requests one after the other, ms."""
    times = []
    for adapter in adapters:
        started = time.perf_counter()
        engine.add(_request(adapter, 1))
        while engine.has_work():
            if engine.step():
                times.append(time.perf_counter() - started)
            engine.wait_for_adapters(0.01)
    return median(times) * 1e3


def _beside(engine: Engine, running: Sequence[str], probes: Sequence[str]) -> _Measured:
    num_tokens = (len(probes) + 3) * _GAP_STEPS
    batch = {engine.add(_request(name, num_tokens)) for name in running}
    started_at: dict[int, float] = {}
    first_tokens: list[float] = []
    # The batch's own prefill and first steps are not counted.
    for _ in range(_GAP_STEPS):
        engine.step()
    steps = 0
    waiting = list(probes)
    begin = time.perf_counter()
    while waiting or len(first_tokens) < len(probes) or steps % _GAP_STEPS:
        if waiting and steps % _GAP_STEPS == 0:
            probe = engine.add(_request(waiting.pop(0), 1))
            started_at[probe] = time.perf_counter()
        for output in engine.step():
            if output.error is not None:
                raise output.error
            if output.request_id in started_at:
                first_tokens.append(time.perf_counter() - started_at[output.request_id])
        steps += 1
    step_s = (time.perf_counter() - begin) / steps
    for request_id in batch:
        engine.abort(request_id)
    while engine.has_work():
        engine.step()
    return _Measured(step_s * 1e3, mean(first_tokens) * 1e3)
