"""How the decode benchmarks measure: one batch's times, memory speed, rows of results."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from openlora.engine import Engine, Request, SamplingParams

_IMPORTED_S = time.perf_counter()
WARM_TOKENS = 8
"""Tokens of the short run whose time is taken off: start, prefill and the first steps."""


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Seconds from the submission of a whole batch.

    ``first_s``: until every request has its first token. ``total_s``: until all have ended.
    """

    first_s: float
    total_s: float


def run_batch(engine: Engine, requests: Sequence[Request]) -> BatchTimes:
    """Submit all requests at once and run them to their ends.

    Raises:
        OpenLoRAError: what a request failed with.
    """
    started = time.perf_counter()
    waiting = {engine.add(request) for request in requests}
    first_s = 0.0
    while engine.has_work():
        outputs = engine.step()
        if not outputs:
            engine.wait_for_adapters(0.01)
        for output in outputs:
            if output.error is not None:
                raise output.error
            waiting.discard(output.request_id)
        if not waiting and not first_s:
            first_s = time.perf_counter() - started
    return BatchTimes(first_s, time.perf_counter() - started)


def make_requests(
    batch: int,
    adapters: Sequence[str],
    *,
    prompt_tokens: int,
    output_tokens: int,
    vocab_size: int,
    seed: int,
    ensemble: int = 1,
) -> list[Request]:
    """``batch`` greedy requests with random prompts; request i uses adapter i modulo their number.

    With ``ensemble``, and equal weights, also the adapters behind that one. No adapters: the base
    model. EOS is ignored, so that each makes ``output_tokens``.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, vocab_size, (batch, prompt_tokens), generator=generator).tolist()
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True, seed=0)
    return [
        Request(
            prompt_token_ids=prompt,
            adapters={
                adapters[(index + offset) % len(adapters)]: 1 / ensemble
                for offset in range(ensemble)
            }
            if adapters
            else {},
            params=params,
        )
        for index, prompt in enumerate(prompts)
    ]


def read_bytes_per_s(device: torch.device, num_bytes: int = 1 << 30, repeats: int = 5) -> float:
    """The speed at which this machine reads memory: the best of ``repeats`` sums of a tensor."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    best_s = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        data.sum().item()
        best_s = min(best_s, time.perf_counter() - started)
    return num_bytes / best_s


def process_age_s() -> float:
    """Seconds since this process was started, imports included; elsewhere than on Linux, since
    this module was imported."""
    if sys.platform != "linux":
        return time.perf_counter() - _IMPORTED_S
    started_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def about_machine(device: str) -> dict[str, object]:
    """Device, versions and date of a run on "cpu" or "cuda"."""
    is_cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


class RowWriter:
    """Prints result rows as JSON lines, and appends them to a file where one is given.

    Args:
        path: the file.
        about: what every row says behind its own fields.
    """

    def __init__(self, path: Path | None, about: Mapping[str, object] | None = None) -> None:
        self._path = path
        self._about = about or {}

    def write(self, row: Mapping[str, object]) -> None:
        """One row; floats are rounded to four digits after the point."""
        full = {**row, **self._about}
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in full.items()}
        line = json.dumps(rounded)
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
