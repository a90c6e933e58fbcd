"""Compiles what an engine launches for a GPU that is not here; prints one JSON line a kernel.

    python -m tests.kernels.compile_all SHAPE DTYPE CAPABILITY

A process of its own: here Triton must not interpret, and there is a driver of a GPU that is none.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

NAME, DTYPE, CAPABILITY = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
CUOBJDUMP = Path(triton.backends.__file__).parent / "nvidia/bin/cuobjdump"


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


driver.set_active(AbsentGPU())
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: divmod(CAPABILITY, 10)

from openlora.adapters.lora_set import SITES, LoRASet  # noqa: E402 - after what they ask for
from openlora.engine.kernel_check import MetaSteps, compile_kernels  # noqa: E402
from openlora.kernels.triton_compile import compile_launches  # noqa: E402
from openlora.models.dummy import DUMMY_CONFIGS  # noqa: E402

LLAMA = DUMMY_CONFIGS["1b"]
CONFIGS = DUMMY_CONFIGS | {
    # What else the families have: wide heads, windows on some layers, soft caps, GELU, QK-norm.
    "gemma": replace(
        LLAMA,
        head_dim=256,
        num_heads=8,
        num_kv_heads=4,
        sliding_window=512,
        sliding_layers=(True, False) * 8,
        attention_soft_cap=50.0,
        hidden_act="gelu_tanh",
        qk_norm=True,
    ),
}


def stack_bytes(cubin: bytes) -> int | None:
    """Bytes of local memory a thread takes (registers spilled); None without the tool."""
    if not CUOBJDUMP.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"STACK:(\d+)", text))


def other_steps(*, deterministic: bool) -> dict[str, list]:
    """Kernels of steps of sizes that are multiples of nothing."""
    config = CONFIGS[NAME]
    steps = MetaSteps(
        config,
        DTYPE,
        lora=True,
        block_size=16,
        max_num_seqs=64,
        max_graph_tokens=0,
        max_model_len=config.max_model_len,
        num_processors=132,
        deterministic=deterministic,
    )
    lora_set = LoRASet((((0, 1.0), (0, 0.5)),) * len(SITES), "any")

    def walk() -> None:
        for counts in ((1, 1, 1, 2), (16, 3), (1, 40), (128,) * 5, (1, 7, 300), (5000,)):
            steps.mixed(counts, lora_set)

    return compile_launches(walk, os.cpu_count() or 1)


def multiplies(ptx: str) -> dict[str, int]:
    """Tensor core instructions, by how often."""
    return Counter(re.findall(r"^\s*(?:@\S+ )?((?:wgmma\.mma_async|mma\.sync)\S*)", ptx, re.M))


def show(*, deterministic: bool) -> None:
    """A line a kernel of an engine."""
    kernels = compile_kernels(
        CONFIGS[NAME], DTYPE, lora=True, max_graph_tokens=512, deterministic=deterministic
    )
    for name, variants in kernels.items():
        for kernel in variants:
            line = {
                "name": name,
                "capability": kernel.metadata.target.arch,
                "shared": kernel.metadata.shared,
                "stack": stack_bytes(kernel.asm["cubin"]),
                "warps": kernel.metadata.num_warps,
                "overlaps": kernel.metadata.launch_pdl,
                "waits": "griddepcontrol.wait" in kernel.asm["ptx"],
                "deterministic": deterministic,
                "multiplies": multiplies(kernel.asm["ptx"]),
            }
            print(json.dumps(line))
    known = {kernel.hash for variants in kernels.values() for kernel in variants}
    for name, variants in other_steps(deterministic=deterministic).items():
        for kernel in variants:
            if kernel.hash not in known:
                print(json.dumps({"name": name, "late": True}))


def main() -> None:
    for deterministic in (False, True):
        show(deterministic=deterministic)


if __name__ == "__main__":
    main()
