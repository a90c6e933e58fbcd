"""A store of random adapters that are nowhere: each one's bytes are made when it is fetched.

An adapter's data are a block of seeded noise, repeated from a place in it that is the adapter's
own: the same bytes each time, other bytes than any other adapter's, and made as fast as memory is
copied. So thousands can be served that fit neither memory nor disk.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from openlora.adapters.adapter_config import CONFIG_FILE
from openlora.adapters.adapter_source import Cancelled
from openlora.adapters.disk_cache import DiskCache
from openlora.adapters.peft_files import WEIGHTS_FILE
from openlora.adapters.peft_format import ContentHash
from openlora.bench.random_adapters import adapter_tensors, noise, peft_settings
from openlora.errors import AdapterFailed
from openlora.models.config import ModelConfig

_BLOCK_ELEMENTS = 1_048_583
"""A prime, so that layers do not repeat; small enough to stay in a core's cache."""
_STRIDE = 611_953
_TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class SyntheticAdapters:
    """Adapters on all linears of a model, by number; a ``Source`` of a ``DiskCache``. Thread-safe.

    Args:
        config: the model.
        ranks: of adapter n: the n-th, over and over.
        seed: of all content.
        dtype: of the files.
    """

    name = "of seeded noise"

    def __init__(
        self, config: ModelConfig, ranks: Sequence[int], seed: int, dtype: torch.dtype
    ) -> None:
        self._ranks = tuple(ranks)
        block = noise(np.random.default_rng(seed), (1, _BLOCK_ELEMENTS), dtype)
        self._block = block.view(torch.uint8).flatten().numpy().data
        self._item_bytes = dtype.itemsize
        self._headers = {rank: _header(config, rank, dtype) for rank in set(ranks)}
        self._numbers: dict[str, int] = {}
        self._hashes: dict[int, str] = {}
        self._lock = threading.Lock()

    def content_hashes(self, numbers: Iterable[int]) -> dict[int, str]:
        """The content hash of each of these; from then on they can be fetched."""
        with self._lock:
            missing = sorted(set(numbers) - self._hashes.keys())
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found = list(threads.map(self._content_hash, missing))
        with self._lock:
            self._hashes.update(zip(missing, found, strict=True))
            self._numbers.update(zip(found, missing, strict=True))
            return dict(self._hashes)

    def size_bytes(self, number: int) -> int:
        """Of its files."""
        return sum(size for _, size, _ in self._files(number))

    def fetch(self, content_hash: str, directory: Path, cancelled: threading.Event) -> None:
        """As ``adapter_source.Source`` says."""
        number = self._numbers.get(content_hash)
        if number is None:
            raise AdapterFailed(f"adapter {content_hash} was never asked for by its number")
        for name, _, chunks in self._files(number):
            # Unbuffered: a chunk is copied once.
            with (directory / name).open("xb", buffering=0) as file:
                for chunk in chunks:
                    if cancelled.is_set():
                        raise Cancelled
                    written = 0
                    while written < len(chunk):
                        written += file.write(chunk[written:])

    def _content_hash(self, number: int) -> str:
        digest = ContentHash()
        for name, size, chunks in self._files(number):
            digest.begin(name, size)
            for chunk in chunks:
                digest.update(chunk)
        return digest.hexdigest()

    def _files(self, number: int) -> list[tuple[str, int, Iterable[memoryview]]]:
        """(name, bytes, content) of each, by name."""
        rank = self._ranks[number % len(self._ranks)]
        settings = json.dumps(peft_settings(rank)).encode()
        header, data_bytes = self._headers[rank]
        return [
            (CONFIG_FILE, len(settings), [memoryview(settings)]),
            (WEIGHTS_FILE, len(header) + data_bytes, self._weights(number, header, data_bytes)),
        ]

    def _weights(self, number: int, header: bytes, data_bytes: int) -> Iterator[memoryview]:
        yield memoryview(header)
        # No two numbers below the block's length begin at one place: the length is a prime.
        start = number * _STRIDE % _BLOCK_ELEMENTS * self._item_bytes
        while data_bytes:
            chunk = self._block[start : start + data_bytes]
            yield chunk
            data_bytes -= len(chunk)
            start = 0


def on_disk(
    root: Path, source: SyntheticAdapters, drawn: Iterable[int], max_bytes: int
) -> dict[int, Path]:
    """Where a ``DiskCache`` has each of these adapters; those drawn most are there already."""
    times = Counter(drawn)
    hashes = source.content_hashes(times)
    cache = DiskCache(root, source, max_bytes)
    paths = {number: cache.path(content) for number, content in hashes.items()}
    most_drawn = [number for number, _ in times.most_common()]
    sizes = list(itertools.accumulate(map(source.size_bytes, most_drawn)))
    fitting = most_drawn[: bisect_right(sizes, max_bytes)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda number: cache.ensure(paths[number]), fitting))
    return paths


def _header(config: ModelConfig, rank: int, dtype: torch.dtype) -> tuple[bytes, int]:
    """What a safetensors file begins with, and how many bytes of data follow."""
    fields, end = {}, 0
    for name, shape in adapter_tensors(config, rank):
        start, end = end, end + shape[0] * shape[1] * dtype.itemsize
        fields[name] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)  # as safetensors pads it: tensors are aligned
    return len(text).to_bytes(8, "little") + text, end
