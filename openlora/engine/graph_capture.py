"""What turns launches into CUDA graphs, and brings their inputs to the device."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Graph(Protocol):
    """Launches that were captured; ``torch.cuda.CUDAGraph`` is one."""

    def replay(self) -> None:
        """Queue all of them again, on the same memory."""


class UploadRing(Protocol):
    """Host buffers for uploads, none rewritten before its last copy has ended."""

    def take(self) -> torch.Tensor:
        """A buffer to fill; give it back with ``sent`` once its copy is queued."""

    def sent(self, buffer: torch.Tensor) -> None:
        """The copy from ``buffer`` is queued on the current stream."""


class GraphDevice(Protocol):
    """A device that captures graphs: ``CudaGraphDevice``, or in tests one that launches again."""

    num_processors: int

    def capture(self, run: Callable[[], T]) -> tuple[Graph, T]:
        """``run``'s launches as a graph, and what it returned: tensors that each replay rewrites.

        They share memory with other graphs: read them before another one is replayed. ``run`` has
        been called before, or something that loads the same kernels.
        """

    def upload_ring(self, num_ints: int) -> UploadRing:
        """Of buffers of ``num_ints`` int32."""


class CudaGraphDevice:
    """``GraphDevice`` on a CUDA GPU; all its graphs share one pool of memory.

    Attributes:
        num_processors: of the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[], T]) -> tuple[Graph, T]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which gives all cached memory back to the driver each time.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads load adapters meanwhile; what they allocate is no part of the capture.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                captured = run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, captured

    def upload_ring(self, num_ints: int) -> UploadRing:
        return PinnedRing(num_ints)


class PinnedRing:
    """``UploadRing`` of pinned memory.

    Args:
        num_ints: int32 elements of each buffer.
        num_buffers: one more than the steps that may be under way.
    """

    def __init__(self, num_ints: int, num_buffers: int = 3) -> None:
        self._free: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque(
            (torch.empty(num_ints, dtype=torch.int32, pin_memory=True), None)
            for _ in range(num_buffers)
        )

    def take(self) -> torch.Tensor:
        buffer, event = self._free.popleft()
        if event is not None:
            event.synchronize()
        return buffer

    def sent(self, buffer: torch.Tensor) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._free.append((buffer, event))


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps the garbage collector out of captures.

    What it finds in the middle of one, graphs of an engine before this one say, could end the
    capture: freeing them is not allowed then.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
