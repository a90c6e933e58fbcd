"""Share of a decode run in which the GPU computes, from torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

_PREFILL_KERNEL = "_prefill_kernel"
"""Runs in no decode step: the last one ends what comes before the decode."""
_TOP = 12

Span = tuple[str, int, int]
"""Name, start and end in ns."""


def decode_busy(run: Callable[[], object]) -> dict[str, object]:
    """Profile ``run``, one batch from its prefill to its end.

    Returns:
        ``gpu_busy``: the share of the time between the end of the prefill and the last kernel in
        which a kernel or copy runs; ``kernels_ms``: what the longest kernels add to it, the time
        not counted in which a kernel waits beside the one before it. Nothing without a GPU.
    """
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    spans = [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == DeviceType.CUDA and event.duration_ns()
    ]
    begin = max((end for name, _, end in spans if name.startswith(_PREFILL_KERNEL)), default=0)
    spans = [span for span in spans if span[1] >= begin]
    totals: Counter[str] = Counter()
    reached = begin
    for name, start, end in sorted(spans, key=lambda span: span[2]):
        totals[name[:60]] += max(0, end - max(start, reached))
        reached = max(reached, end)
    return {
        "gpu_busy": busy_share(spans),
        "kernels_ms": {name: round(ns / 1e6, 2) for name, ns in totals.most_common(_TOP)},
    }


def busy_share(spans: Iterable[Span]) -> float:
    """Share of the time from the first start to the last end that lies in a span."""
    ordered = sorted((start, end) for _, start, end in spans)
    if not ordered:
        return 0.0
    busy, reached = 0, ordered[0][0]
    for start, end in ordered:
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    return busy / max(reached - ordered[0][0], 1)
