"""All Triton kernels compile for GPUs that this machine lacks, as the engine launches them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""What one program may take of a processor."""
SPILLED_BYTES = {
    "_gated_kernel": 256,
    "_expand_kernel": 64,
    "_rope_and_write_kv_kernel": 64,
    "_invariant_attention_kernel": 64,
}
"""Local memory of a thread. Few warps that hold all of a tile of 16 rows spill a little, and large
angles are reduced there, with some versions of Triton (3.6 and 3.9 were tried); all other kernels
have what they need in registers. In fp32, which is for comparisons and not for speed, the attention
kernels' tiles do not fit there (up to 8 KB a thread)."""


def compiled(shape: str, dtype: str, capability: int) -> list[dict]:
    command = [sys.executable, "-m", "tests.kernels.compile_all", shape, dtype, str(capability)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernel_names() -> set[str]:
    names = set()
    for path in (ROOT / "openlora/kernels").glob("triton_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names.add(node.name)
    return names


def check_invariance(kernels: list[dict]) -> None:
    """Of a deterministic engine: a row goes through the same instructions in any step."""
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for kernel in kernels:
        kinds.setdefault(kernel["name"], set()).add(tuple(sorted(kernel["multiplies"])))
    # Few rows and many take tiles of other sizes, cut into products of one size.
    assert len(kinds["_invariant_linear_kernel"]) == 1, kinds
    for name in ("_shrink_kernel", "_expand_kernel", "_invariant_attention_kernel"):
        assert len(kinds[name]) == 1, kinds
    # What the usual steps choose between.
    for name in ("_decode_kernel", "_prefill_kernel", "_gated_kernel"):
        assert name not in kinds


def check(shape: str, dtype: str, capability: int) -> None:
    found = compiled(shape, dtype, capability)
    kernels = [kernel for kernel in found if not kernel.get("late")]
    missing = set() if shape == "gemma" else {"_norm_heads_kernel"}
    assert {kernel["name"] for kernel in kernels} == kernel_names() - missing
    for kernel in kernels:
        name = kernel["name"]
        assert kernel["capability"] == capability
        assert kernel["shared"] <= SHARED_BYTES[capability], kernel
        if dtype != "float32" and kernel["stack"] is not None:
            assert kernel["stack"] <= SPILLED_BYTES.get(name, 0), kernel
        # A launch that may start early and never waits would read what is not written yet; one
        # that ends without waiting would let its successor do so.
        overlaps = capability >= 90 and name != "_take_tokens_kernel"
        assert (kernel["overlaps"], kernel["waits"]) == (overlaps, overlaps), kernel
    check_invariance([kernel for kernel in kernels if kernel["deterministic"]])
    # Steps of other sizes compile nothing.
    late = Counter(kernel["name"] for kernel in found if kernel.get("late"))
    assert not late


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_kernels_of_an_8b_model_on_hopper() -> None:
    # About 20 s of one core where Triton's cache is cold, a few seconds where it is warm.
    check("8b", "bfloat16", 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "capability"),
    [
        ("8b", "bfloat16", 80),
        ("1b", "float16", 90),
        ("1b", "float32", 80),
        ("gemma", "bfloat16", 90),
        ("gemma", "float32", 90),
    ],
)
def test_kernels_of_other_shapes_types_and_gpus(shape: str, dtype: str, capability: int) -> None:
    check(shape, dtype, capability)


BROKEN = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from openlora.kernels.triton_compile import KernelFailed, compile_launches

class AbsentGPU:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

@triton.jit
def _sound_kernel(x_ptr):
    tl.store(x_ptr, 1)

@triton.jit
def _broken_kernel(x_ptr):
    tl.store(x_ptr, tl.dot(x_ptr, 1))

driver.set_active(AbsentGPU())
launch = triton.runtime.jit.JITFunction.run
def walk():
    _sound_kernel[(1,)](torch.empty(1, device="meta"))
    _broken_kernel[(1,)](torch.empty(1, device="meta"))
try:
    compile_launches(walk, 2)
except KernelFailed as failed:
    print(failed)
assert triton.runtime.jit.JITFunction.run is launch
print(list(compile_launches(lambda: _sound_kernel[(1,)](torch.empty(1, device="meta")), 1)))
"""


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first.startswith("_broken_kernel: CompilationError: ")
    assert second == "['_sound_kernel']"
