"""Tests. Without a GPU, Triton's kernels run in its interpreter: chosen before torch loads it."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
