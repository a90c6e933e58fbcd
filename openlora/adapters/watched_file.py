"""Reading what a store gives: it may be slow, endless, or wanted no longer. Stdlib only."""

from __future__ import annotations

import threading
import time
from typing import BinaryIO

from openlora.adapters.adapter_source import Cancelled
from openlora.errors import AdapterFailed


class FetchLimits:
    """What all files of one fetch may take together.

    Args:
        cancelled: set when nobody wants them any more.
        timeout_s: most time, from now on.
        max_bytes: most bytes.
    """

    def __init__(self, cancelled: threading.Event, timeout_s: float, max_bytes: int) -> None:
        self._cancelled = cancelled
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def check(self, num_bytes: int = 0) -> None:
        """So many more bytes were read.

        Raises:
            Cancelled: nobody wants them.
            TimeoutError: it takes too long.
            AdapterFailed: there are too many.
        """
        if self._cancelled.is_set():
            raise Cancelled
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"not read within {self._timeout_s:g} s")
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            raise AdapterFailed(
                f"the store gives more than {self._max_bytes} bytes, which is all that the adapter "
                "cache may hold (OPENLORA_ADAPTER_CACHE_BYTES): raise that, or add it again"
            )


class WatchedFile:
    """A file whose reading ends at its fetch's limits."""

    def __init__(self, file: BinaryIO, limits: FetchLimits) -> None:
        self._file = file
        self._limits = limits

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        self._limits.check()
        data = self._file.read(size)
        self._limits.check(len(data))
        return data
