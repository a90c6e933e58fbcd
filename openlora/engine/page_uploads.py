"""Copies of adapters into their pages beside the running steps, on a CUDA stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openlora.adapters.loader import LoadedAdapter
from openlora.adapters.page_tensors import PageTensors
from openlora.adapters.pages import SitePages
from openlora.engine.step import StepRow


@dataclass(frozen=True, slots=True)
class _Upload:
    """``adapter`` keeps the memory that is copied from until ``done``."""

    done: torch.cuda.Event
    adapter: LoadedAdapter
    pages: frozenset[tuple[int, int]]


class PageUploads:
    """Writes pages while steps run; only a step that names such a page waits, on the device.

    The page pool hands a page out only after the last step that named it has run, so that a copy
    need not wait for any step. Engine thread only.

    Args:
        pages: what is written to.
    """

    def __init__(self, pages: PageTensors, device: torch.device) -> None:
        self._pages = pages
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[_Upload] = deque()
        # The pages' first content, zeros, was written on another stream.
        torch.cuda.synchronize(device)

    def write(self, pages: SitePages, adapter: LoadedAdapter) -> None:
        """Start the copy of ``adapter``; as ``PageTensors.write``."""
        with torch.cuda.stream(self._stream):
            self._pages.write(pages, adapter)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        named = frozenset((site, page) for site, ids in enumerate(pages) for page in ids)
        self._under_way.append(_Upload(done, adapter, named))

    def wait_for(self, rows: Sequence[StepRow]) -> None:
        """Let the current stream wait until the pages that ``rows`` name are written."""
        while self._under_way and self._under_way[0].done.query():  # type: ignore[no-untyped-call]
            self._under_way.popleft()
        if not self._under_way:
            return
        named = {
            (site, page)
            for lora_set in {row.lora_set for row in rows}
            for site, entries in enumerate(lora_set.pages)
            for page, _ in entries
        }
        for upload in self._under_way:
            if not named.isdisjoint(upload.pages):
                torch.cuda.current_stream().wait_event(upload.done)
