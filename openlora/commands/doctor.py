"""What is installed, which backend each part will use, what is missing and how to get it.

examples:
  openlora doctor
  openlora doctor --json

The exit status is 1 where something that `openlora up` needs is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openlora import __version__
from openlora.adapters.stores import adapter_cache, cache_of, is_url, open_store, store_setting
from openlora.commands.checks import ENGINE_PACKAGES, SERVE_PACKAGES, missing_packages
from openlora.commands.config import process_environment
from openlora.engine.host_memory import available_memory
from openlora.errors import SetupError

if TYPE_CHECKING:
    from openlora.engine.attention_libraries import AttentionNeeds

# Distribution names where they differ from the import name.
_DISTRIBUTIONS = {"kafka": "kafka-python", "prometheus_client": "prometheus-client"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``state`` is "ok", "optional" (works without) or "missing"."""

    part: str
    state: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns the exit status."""
    findings = [finding for check in CHECKS for finding in check()]
    broken = [finding for finding in findings if finding.state == "missing"]
    if args.json:
        from openlora.commands.tables import print_json

        print_json([asdict(finding) for finding in findings])
        return 1 if broken else 0
    width = max(len(finding.part) for finding in findings)
    for finding in findings:
        print(f"{finding.state:<9} {finding.part:<{width}}  {finding.detail}")
    print()
    print(
        "missing: " + ", ".join(finding.part for finding in broken)
        if broken
        else "`openlora up` has all it needs."
    )
    return 1 if broken else 0


def _python() -> list[Finding]:
    return [
        Finding("openlora", "ok", __version__),
        Finding("python", "ok", f"{platform.python_version()} ({sys.executable})"),
    ]


def _packages() -> list[Finding]:
    findings = []
    for names, extra in ((ENGINE_PACKAGES, ""), (SERVE_PACKAGES, "[serve]")):
        missing = missing_packages(names)
        for name in names:
            if name in missing:
                findings.append(Finding(name, "missing", f"pip install 'openlora{extra}'"))
            else:
                version = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
                findings.append(Finding(name, "ok", version))
    return findings


def _gpu() -> list[Finding]:
    if missing_packages(["torch"]):
        return []
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda
        detail = (
            "no GPU answers"
            if build
            else "this torch is a CPU build; on a machine with an NVIDIA GPU install the CUDA build"
        )
        return [Finding("gpu", "optional", detail)]
    return [
        Finding("gpu", "ok", f"{props.name}, {props.total_memory / 1e9:.0f} GB, CUDA "
                f"{torch.version.cuda}, compute {props.major}.{props.minor}")
        for props in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]  # fmt: skip


def _backends() -> list[Finding]:
    if missing_packages(["torch"]):
        return []
    import torch

    if not torch.cuda.is_available():
        return [_cpu_kernels()]
    if missing_packages(["triton"]):
        return [Finding("GPU kernels", "missing", "pip install triton")]
    return _gpu_kernels()


def _gpu_kernels() -> list[Finding]:
    """Compiles them all, as an engine's start does; seconds where it was done before."""
    import torch

    from openlora.engine.attention_libraries import AttentionNeeds
    from openlora.engine.config import MAX_GRAPH_TOKENS
    from openlora.engine.kernel_check import check_kernels
    from openlora.models.dummy import DUMMY_CONFIGS

    config = DUMMY_CONFIGS["1b"]
    try:
        count = check_kernels(
            config,
            torch.bfloat16,
            lora=True,
            block_size=16,
            max_num_seqs=64,
            max_graph_tokens=MAX_GRAPH_TOKENS,
            max_model_len=config.max_model_len,
        )
    except SetupError as error:
        return [Finding("GPU kernels", "missing", error.message)]
    major, minor = torch.cuda.get_device_capability()
    return [
        Finding("GPU kernels", "ok", f"{count} compile for compute {major}.{minor}"),
        *_attention(AttentionNeeds.of(DUMMY_CONFIGS["8b"], torch.bfloat16, 16, (major, minor))),
        Finding("lora", "ok", "Triton kernels of this project (SGMV)"),
    ]


def _attention(needs: AttentionNeeds) -> list[Finding]:
    """What `auto` takes for a model of these needs, and what there is beside it."""
    from openlora.engine.attention_backends import TRITON, choose_attention
    from openlora.engine.attention_libraries import LIBRARIES

    choice = choose_attention("auto", needs)
    name = "Triton kernels of this project" if choice.name == TRITON else choice.name
    findings = [Finding("attention", "ok", name)]
    findings += [Finding("attention", "optional", remark) for remark in choice.remarks]
    for library in LIBRARIES:
        if library.version() is None:
            remark = f"{library.name}: {library.why_not(needs)}"
            findings.append(Finding("attention", "optional", remark))
    return findings


def _cpu_kernels() -> Finding:
    from openlora.kernels.native.build import NativeUnavailable
    from openlora.kernels.native.library import native_kernels

    try:
        native_kernels()
    except NativeUnavailable as unavailable:
        return Finding("CPU kernels", "optional", f"torch computes, slower: {unavailable}")
    return Finding("CPU kernels", "ok", "of this project, compiled for this processor")


def _servers() -> list[Finding]:
    from openlora.local import embedded_broker, embedded_redis

    findings = []
    # Nothing is started: a server that is only described still wants to see its folder.
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("embedded Kafka", embedded_broker), ("embedded Redis", embedded_redis)):
            try:
                findings.append(Finding(name, "ok", make(Path(folder)).spec.argv[0]))
            except SetupError as error:
                findings.append(
                    Finding(name, "missing", f"{error.message} (or give --kafka and --redis)")
                )
    return findings


def _demo_model() -> list[Finding]:
    from openlora.demo.model import find_gguf

    try:
        return [Finding("demo model", "ok", str(find_gguf()))]
    except SetupError as error:
        return [Finding("demo model", "optional", error.message)]


def _adapter_tiers() -> list[Finding]:
    """Where adapters are kept, and what of it is on this machine."""
    environ = process_environment()
    location, caches = store_setting(None, environ), adapter_cache(environ)
    try:
        name = open_store(location, caches).name
    except SetupError as error:
        return [Finding("adapter store", "missing", error.message)]
    if not is_url(location):
        return [Finding("adapter store", "ok", f"{name} (a directory: no cache of its own)")]
    cache = cache_of(location, caches)
    held = sum(len(entry.name) == 64 for entry in cache.iterdir()) if cache.is_dir() else 0
    return [
        Finding("adapter store", "ok", name),
        Finding("adapter cache", "ok", f"{cache} ({held} adapters of the store)"),
    ]


def _machine() -> list[Finding]:
    findings = [Finding("cores", "ok", str(os.cpu_count()))]
    if not missing_packages(["psutil"]):
        import psutil

        available, total = available_memory(), psutil.virtual_memory().total
        state = "ok" if available > 2e9 else "missing"
        findings.append(
            Finding("memory", state, f"{available / 1e9:.1f} GB free of {total / 1e9:.1f} GB, "
                    "container limits counted (the demo model needs about 2 GB)")
        )  # fmt: skip
    home = Path.home()
    findings.append(Finding("disk", "ok", f"{shutil.disk_usage(home).free / 1e9:.0f} GB free"))
    return findings


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _packages,
    _gpu,
    _backends,
    _servers,
    _demo_model,
    _adapter_tiers,
    _machine,
)
