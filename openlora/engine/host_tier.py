"""Adapters kept in host memory, ready to be copied into pages: the tier between files and GPU.

The memory is taken, and pinned for the GPU's copy engine, once at the start: pinning stalls every
launch of the process for as long as it takes (90 ms for 256 MiB on an H100 machine).
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from openlora.adapters.loader import Zeros
from openlora.adapters.stamp import Stamp, stamp
from openlora.adapters.tier_stats import TierCounter, TierStats
from openlora.errors import OpenLoRAError, SetupError

logger = logging.getLogger(__name__)

_ALIGNMENT = 256
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


class Extents:
    """Which parts of a range of bytes are taken. Pure; first fit.

    Args:
        size: of the range.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    @property
    def taken(self) -> int:
        """Bytes that are not free."""
        return sum(self._sizes.values())

    def take(self, size: int) -> int | None:
        """Where ``size`` bytes lie from now on; None where no gap is as large."""
        size = -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        at = 0
        for start in self._starts:
            if start - at >= size:
                break
            at = start + self._sizes[start]
        if at + size > self.size:
            return None
        insort(self._starts, at)
        self._sizes[at] = size
        return at

    def give_back(self, start: int) -> None:
        """What ``take`` gave; KeyError if it did not."""
        del self._sizes[start]
        del self._starts[bisect_left(self._starts, start)]

    def check_integrity(self) -> None:
        """Assert that parts lie within the range and do not overlap."""
        assert self._starts == sorted(self._sizes)
        ends = [start + self._sizes[start] for start in self._starts]
        assert all(end <= start for end, start in zip(ends, self._starts[1:], strict=False))
        assert all(end <= self.size for end in ends)


class HostMemory:
    """One block of host memory, handed out as tensors. Thread-safe.

    A tensor's part is free again when the tensor and all its views are gone.

    Args:
        num_bytes: of the block.
        pin: for a GPU's copies; where the system refuses, copies are slower, and a warning says so.

    Raises:
        SetupError: the machine has not so much.
    """

    def __init__(self, num_bytes: int, *, pin: bool) -> None:
        self._lock = threading.Lock()
        self._extents = Extents(num_bytes)
        # Appended to by finalizers, which may run anywhere; read under the lock.
        self._gone: deque[int] = deque()
        # Where it is pinned it is written to first, so that the pages exist: that is 5 times
        # faster. Where not, it takes no memory before it is used.
        try:
            self._block = (torch.zeros if pin else torch.empty)(num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise SetupError(
                f"this machine does not give {num_bytes >> 20} MiB for adapters in host memory; "
                "lower adapter_host_bytes (--host-mib of the benchmark)"
            ) from error
        if pin and num_bytes:
            self._pin()

    @property
    def num_bytes(self) -> int:
        """Of the block."""
        return self._extents.size

    @property
    def bytes_taken(self) -> int:
        """Handed out and not free again."""
        with self._lock:
            self._collect()
            return self._extents.taken

    def empty(self, num_bytes: int) -> torch.Tensor | None:
        """uint8 [num_bytes], not initialised; None where there is no room."""
        with self._lock:
            self._collect()
            start = self._extents.take(num_bytes)
        if start is None:
            return None
        # torch keeps this very array for as long as any tensor over its bytes lives.
        part = self._block.numpy()[start : start + num_bytes]
        weakref.finalize(part, self._gone.append, start)
        return torch.from_numpy(part)

    def _collect(self) -> None:
        while self._gone:
            self._extents.give_back(self._gone.popleft())

    def _pin(self) -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self._block.data_ptr()
        status = cudart.cudaHostRegister(address, self.num_bytes, 0)
        if status == cudart.cudaError.success:
            # Before the memory goes, which the finalizer keeps until then: what comes to lie at
            # its address could not be pinned any more.
            weakref.finalize(self, _unpin, cudart, address, self._block)
            return
        with suppress(RuntimeError):
            # Takes the error off, which the next launch would report as its own.
            torch.zeros(1, device="cuda")
        logger.warning(
            "cannot pin %d MiB for adapters (%s): loads slow running requests down; raise the "
            "locked-memory limit or lower adapter_host_bytes",
            self.num_bytes >> 20,
            status,
        )


def _unpin(cudart: Any, address: int, _block: torch.Tensor) -> None:
    cudart.cudaHostUnregister(address)


class Load(Protocol[_T_co]):
    """Reads an adapter directory into tensors that ``zeros`` makes."""

    def __call__(self, path: Path, zeros: Zeros) -> _T_co: ...


class HostTier(Generic[_T]):
    """Loads adapters into ``HostMemory`` and keeps them there, least recently used ones go first.

    Thread-safe. An adapter that has gone from the tier while it is staged, or copied, keeps its
    memory until whoever holds it lets go. One whose files have changed is another adapter; a
    directory named by its content never changes.

    Args:
        load: reads an adapter; raises ``OpenLoRAError``.
        memory: where its tensors go; tensors that find no room there are made elsewhere, and such
            an adapter is not kept.
        beside: bytes that an adapter takes beside ``memory``; together they are no more than it.
    """

    def __init__(
        self, load: Load[_T], memory: HostMemory, beside: Callable[[_T], int] = lambda _: 0
    ) -> None:
        self._load = load
        self._memory = memory
        self._beside = beside
        self._lock = threading.Lock()
        self._counter = TierCounter()
        self._kept: OrderedDict[Path, tuple[Stamp, _T]] = OrderedDict()

    def cached(self, path: Path) -> _T | None:
        """The adapter at ``path`` if it is here, as fresh as its files; reads no file's content."""
        with self._lock:
            if path not in self._kept:
                return None
        now = stamp(path)
        with self._lock:
            found = self._kept.get(path)
            if found is None or found[0] != now:
                return None
            self._kept.move_to_end(path)
        self._counter.hit()
        return found[1]

    def load(self, path: Path) -> _T:
        """The adapter at ``path``, read where it is not here. Raises what ``load`` raises."""
        found = self.cached(path)
        if found is not None:
            return found
        before, started = stamp(path), time.perf_counter()
        zeros = _Zeros(self._room)
        try:
            loaded = self._load(path, zeros)
        except OpenLoRAError:
            self._counter.failed()
            raise
        self._counter.loaded(time.perf_counter() - started)
        # Read while somebody wrote: what it is now is for the next load to find out.
        if not zeros.went_elsewhere and stamp(path) == before:
            self._keep(path, before, loaded)
        return loaded

    def stats(self, names: Mapping[Path, str]) -> TierStats:
        """``names``: of the adapters by their paths."""
        with self._lock:
            paths = list(self._kept)
            beside = sum(self._beside(loaded) for _, loaded in self._kept.values())
        return self._counter.stats(
            "host",
            adapters=len(paths),
            bytes_used=self._memory.bytes_taken + beside,
            bytes_limit=self._memory.num_bytes,
            names=tuple(names[path] for path in paths if path in names),
        )

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, path: Path) -> bool:
        """Whether an adapter of this path is here, however fresh; counts nothing."""
        with self._lock:
            return path in self._kept

    def _keep(self, path: Path, at: Stamp, loaded: _T) -> None:
        with self._lock:
            self._kept.pop(path, None)
            self._kept[path] = (at, loaded)
            beside = sum(self._beside(each) for _, each in self._kept.values())
            gone = []
            while beside > self._memory.num_bytes and self._kept:
                gone.append(self._kept.popitem(last=False)[1][1])
                beside -= self._beside(gone[-1])
                self._counter.evicted()

    def _room(self, num_bytes: int) -> torch.Tensor | None:
        """uint8 of that size; None where even an empty tier has no room."""
        if num_bytes > self._memory.num_bytes:
            return None
        while (part := self._memory.empty(num_bytes)) is None:
            with self._lock:
                if not self._kept:
                    break
                _, gone = self._kept.popitem(last=False)
            self._counter.evicted()
            # Outside of the lock: the memory comes back here, if nobody else holds the adapter.
            del gone
        return part


class _Zeros:
    """Makes the tensors of one load."""

    def __init__(self, room: Callable[[int], torch.Tensor | None]) -> None:
        self._room = room
        self.went_elsewhere = False

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        part = self._room(num_bytes) if num_bytes else None
        if part is None:
            self.went_elsewhere |= num_bytes > 0
            return torch.zeros(shape, dtype=dtype)
        return part.view(dtype).view(tuple(shape)).zero_()
