"""Which GPU or how many CPU threads each worker of one machine gets. Pure but for a look at /dev.

Several workers that each take all cores slow one another down several times over; several that
all take the first GPU run out of its memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

_THREADS = "OMP_NUM_THREADS"
_GPUS = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """IDs of the GPUs that workers may use: the user's own list, else all of this machine."""
    if _GPUS in environ:
        return [gpu for gpu in environ[_GPUS].split(",") if gpu.strip()]
    devices = Path("/dev").glob("nvidia[0-9]*")
    return sorted((device.name.removeprefix("nvidia") for device in devices), key=int)


def worker_environments(
    workers: int, device: str, environ: Mapping[str, str], gpus: Sequence[str]
) -> list[dict[str, str]]:
    """What to add to each worker's environment: its GPU (round robin) or its share of the cores.

    A single worker takes what there is, and the user's own OMP_NUM_THREADS stands.
    """
    if workers == 1:
        return [{}]
    if gpus and device != "cpu":
        return [{_GPUS: gpus[index % len(gpus)]} for index in range(workers)]
    if _THREADS in environ:
        return [{} for _ in range(workers)]
    threads = (
        max(1, len(os.sched_getaffinity(0)) // workers)
        if hasattr(os, "sched_getaffinity")
        else max(1, (os.cpu_count() or 1) // workers)
    )
    return [{_THREADS: str(threads)} for _ in range(workers)]
