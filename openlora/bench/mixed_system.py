"""A whole `openlora up` for the benchmark, and what its processes take of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from openlora.bench.mixed_subject import Subject
from openlora.errors import SetupError
from openlora.local import free_port
from openlora.local.process import die_with_parent, end_child

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
_ROLES = {
    "workers.engine_process": "engine",
    "worker": "worker I/O",
    "gateway": "gateway",
    "producer": "producer",
    "broker": "broker",
    "valkey": "redis",
}
"""A word of the command line → what the process is; the first that is found counts."""


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """Where it answers, and the process that started all others."""

    url: str
    process: psutil.Process

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of each process so far."""
        spent: dict[str, float] = {}
        for child in self.process.children(recursive=True):
            words = " ".join(child.cmdline())
            role = next((role for word, role in _ROLES.items() if word in words), "others")
            times = child.cpu_times()
            spent[role] = spent.get(role, 0.0) + times.user + times.system
        return spent


def shares(
    before: Mapping[str, float], after: Mapping[str, float], seconds: float
) -> dict[str, float]:
    """Cores that each process took."""
    return {role: round((after[role] - before.get(role, 0.0)) / seconds, 3) for role in after}


@contextmanager
def running_system(directory: Path, subject: Subject, device: str) -> Iterator[RunningSystem]:
    """`openlora up` of ``subject`` with folders of its own, once it is ready.

    Raises:
        SetupError: it does not become so.
    """
    port = free_port()
    argv = [sys.executable, "-m", "openlora", "up", "--port", str(port), "--device", device]
    if not subject.is_demo:
        argv += ["--model", str(subject.model)]
    if subject.adapters and not subject.is_demo:
        argv += ["--adapters", str(subject.adapters[0].parent)]
    environ = {
        **os.environ,
        "XDG_STATE_HOME": str(directory / "state"),
        "OPENLORA_STORE": str(directory / "store"),
        "OPENLORA_ENGINE": "dummy" if subject.load_format == "dummy" else "model",
    }
    log_path = directory / "up.log"
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            argv, env=environ, stdout=log, stderr=log, preexec_fn=die_with_parent()
        )
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while "Ready:" not in log_path.read_text(encoding="utf-8"):
            if child.poll() is not None or time.monotonic() > deadline:
                raise SetupError(f"`openlora up` did not start: {log_path.read_text()[-500:]}")
            time.sleep(0.2)
        yield RunningSystem(f"http://127.0.0.1:{port}", psutil.Process(child.pid))
    finally:
        end_child(child, STOP_TIMEOUT_S)
