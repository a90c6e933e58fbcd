"""Programmatic dependent launch: a kernel may start while the one before it still runs.

Where the GPU has it (Hopper and later), a kernel launched so is set up, and reads what no kernel
before it writes (weights, pages, plans), while its predecessor drains; ``gdc_wait`` then blocks
until every earlier launch has ended and its writes are visible. Each kernel waits at least once,
work or not, so that the end of one launch means the end of all before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait", "launch_options", "overlaps_launches"]


@functools.cache
def overlaps_launches() -> bool:
    """Whether kernels are launched so: on the GPU at hand, never in the interpreter."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


def launch_options(overlap: bool) -> dict[str, Any]:
    """Launch keywords of a kernel whose ``OVERLAP`` is ``overlap``."""
    return {"launch_pdl": True} if overlap else {}
