"""Compiling the native kernels: once, by several at a time, over broken files, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openlora.kernels.native import build
from openlora.kernels.native.build import NativeUnavailable, load
from openlora.kernels.native.library import NativeKernels
from tests.kernels.native import kernels_or_skip

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path):
    kernels_or_skip()
    return tmp_path / "cache"


def count_compilations(monkeypatch) -> list[Path]:
    """Where the sources are compiled from now on: without optimization, which takes most of it."""
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))
    compiled = []
    original = build._compile

    def compile_once(compiler, directory, key):
        compiled.append(directory)
        return original(compiler, directory, key)

    monkeypatch.setattr(build, "_compile", compile_once)
    return compiled


def test_compiled_once_and_found_again_unless_it_is_broken(cache, monkeypatch):
    compiled = count_compilations(monkeypatch)
    NativeKernels(cache)
    [path] = cache.glob("*.so")
    NativeKernels(cache)
    assert len(compiled) == 1
    assert [p.name for p in cache.iterdir()] == [path.name]
    assert cache.stat().st_mode & 0o777 == 0o700
    content = path.read_bytes()
    path.unlink()  # the old one is mapped: a broken file comes as another
    path.write_bytes(content[: len(content) // 2])
    NativeKernels(cache)
    assert len(compiled) == 2
    assert path.read_bytes() == content


def test_a_directory_that_others_can_write_is_not_trusted(cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)
    compiled = count_compilations(monkeypatch)
    load(cache)
    assert not list(cache.iterdir())
    assert not compiled[0].exists()


def test_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeUnavailable, match="no C compiler"):
        load(cache)


def test_a_compiler_that_fails(cache, tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="out of luck"):
        load(cache)


SCRIPT = """
import sys
from pathlib import Path
import torch
from openlora.kernels.native import build
build._FLAGS = (*build._FLAGS, "-O0")
from openlora.kernels.native.library import Arena, NativeKernels
from openlora.kernels.native.linear import NativeLinear
linear = NativeLinear(NativeKernels(Path(sys.argv[1])), Arena(), torch.eye(40))
assert torch.equal(linear(torch.eye(40)), torch.eye(40))
maps = Path("/proc/self/maps").read_text().split()
print(len({part for part in maps if "libgomp" in part or "libomp" in part or "libiomp" in part}))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux' /proc")
def test_several_processes_at_once_and_one_openmp_runtime(cache):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(cache)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == ["1", "1"]
    assert 1 <= len(list(cache.glob("*.so"))) <= 2
    assert len(list(cache.iterdir())) == len(list(cache.glob("*.so")))
