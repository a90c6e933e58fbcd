"""The compiled kernels as Python sees them: operations, steps, packed weights.

The structures mirror ``common.h``; what each field of an operation means stands with its kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
import torch

from openlora.kernels.native import build
from openlora.kernels.native.build import NativeUnavailable

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Element types that the kernels know, with their numbers there."""

MAX_GROUP = 8
"""Most rows of a LoRA group, see ``plan.py``."""

MAX_GROUP_DIM = 16384
"""Most query heads of one kv head, times head_dim."""


class Kind(IntEnum):
    """Operations, in the order of ``KERNELS`` in kernels.c."""

    LINEAR = 0
    SHRINK = 1
    EXPAND = 2
    NORM = 3
    NORM_HEADS = 4
    GATED = 5
    ROPE = 6
    ATTENTION = 7
    EMBED = 8
    ADD = 9
    GREEDY = 10
    SOFT_CAP = 11


class Op(ctypes.Structure):
    """One operation."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("n", ctypes.c_int64 * 8),
        ("p", ctypes.c_void_p * 8),
        ("f", ctypes.c_float * 2),
    )


class Site(ctypes.Structure):
    """One LoRA site of a step."""

    _fields_ = (
        ("num_tasks", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("tasks", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
    )


class Step(ctypes.Structure):
    """What changes from step to step."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("decode_rows", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_width", ctypes.c_int64),
        ("cos", ctypes.c_void_p * 2),
        ("sin", ctypes.c_void_p * 2),
        ("sites", Site * 4),
    )


class PageFill(ctypes.Structure):
    """A tensor that goes to LoRA pages, transposed; see ``Fill`` in pages.c."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("page_stride", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("is_b", ctypes.c_int32),
        ("source_type", ctypes.c_int32),
        ("target_type", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


def make_op(
    kind: Kind,
    dtype: torch.dtype,
    tensors: Sequence[torch.Tensor | None],
    numbers: Sequence[int],
    factors: Sequence[float] = (),
) -> Op:
    """An operation over ``tensors``, which must outlive it, on elements of ``dtype``."""
    op = Op(kind, TYPES[dtype])
    op.n[: len(numbers)] = numbers
    op.p[: len(tensors)] = [None if t is None else t.data_ptr() for t in tensors]
    op.f[: len(factors)] = factors
    return op


class NativeKernels:
    """The compiled kernels.

    Args:
        cache: see ``build.load``.

    Raises:
        NativeUnavailable: they cannot be had here.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._library = build.load(cache)
        self._run = self._library.ol_run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self._run.restype = None
        self._library.ol_pack.restype = None
        for name in ("ol_abi", "ol_packed_bytes", "ol_fill_pages"):
            getattr(self._library, name).restype = ctypes.c_int64
        sizes = [ctypes.sizeof(each) for each in (Op, Step, PageFill)]
        expected = (*sizes, MAX_GROUP, MAX_GROUP_DIM)
        if tuple(self._library.ol_abi(which) for which in range(5)) != expected:
            raise NativeUnavailable("the compiled kernels do not fit this version")

    def run(self, op: Op, step: Step) -> None:
        """Run one operation on ``step``."""
        self._run(ctypes.addressof(op), 1, ctypes.addressof(step), torch.get_num_threads())

    def run_all(self, ops: ctypes.Array[Op], step: Step, first: int, end: int) -> None:
        """Run ``ops[first:end]`` in order on ``step``."""
        address = ctypes.addressof(ops) + first * ctypes.sizeof(Op)
        self._run(address, end - first, ctypes.addressof(step), torch.get_num_threads())

    def fill_pages(self, fills: np.ndarray) -> bool:
        """Fill zeroed pages, on this thread alone and without the interpreter's lock.

        Args:
            fills: ``PageFill`` [fills], contiguous.

        Returns:
            Whether all that was written is finite.
        """
        address, count = ctypes.c_void_p(fills.ctypes.data), ctypes.c_int64(len(fills))
        return self._library.ol_fill_pages(address, count) < 0

    def pack(self, weight: torch.Tensor, arena: Arena) -> torch.Tensor:
        """``weight`` [out, in], fp32 or bf16, as the LINEAR operation reads it; opaque bytes."""
        number, (rows, columns) = TYPES[weight.dtype], weight.shape
        sizes = (ctypes.c_int64(rows), ctypes.c_int64(columns), ctypes.c_int64(number))
        packed = arena.take(self._library.ol_packed_bytes(*sizes))
        weight = weight.contiguous()
        self._library.ol_pack(
            ctypes.c_void_p(weight.data_ptr()),
            *sizes,
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return packed


@cache
def native_kernels() -> NativeKernels:
    """The kernels of this process, compiled or loaded at the first call.

    Raises:
        NativeUnavailable: they cannot be had here.
    """
    return NativeKernels()


_SLAB_BYTES = 64 << 20
_ALIGNMENT = 4096
_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14


class Arena:
    """Memory for a model's packed weights, one behind the other in huge pages.

    Alone, a small weight would lie in 4 KiB pages: a fifth of the reading speed.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], aligned to a page, not initialised."""
        if self._used + num_bytes > len(self._slab):
            # What a slab has behind its last weight is never touched, and so takes no memory.
            self._slab = torch.empty(max(_SLAB_BYTES, num_bytes) + _ALIGNMENT, dtype=torch.uint8)
            ask_for_huge_pages(self._slab)
            self._used = -self._slab.data_ptr() % _ALIGNMENT
        taken = self._slab[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return taken


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages where ``tensor`` is not touched yet; not every system has them."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    start = -(-tensor.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if madvise is not None and end > start:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
