"""A store of adapters for the disk tier's tests."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from openlora.adapters.adapter_source import Cancelled
from openlora.adapters.peft_format import inspect_adapter
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import write_adapter


class FolderSource:
    """A store in a folder that fails on demand."""

    name = "test://store"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetches: list[str] = []
        self.errors: list[Exception] = []
        self.gate: threading.Event | None = None

    def add(self, *ranks: int) -> list[str]:
        hashes = []
        for rank in ranks:
            path = write_adapter(self.root / f"new{rank}", rank=rank)
            content = inspect_adapter(path).hash
            path.rename(self.root / content)
            hashes.append(content)
        return hashes

    def fetch(self, content_hash: str, directory: Path, cancelled: threading.Event) -> None:
        self.fetches.append(content_hash)
        if self.gate is not None:
            while not self.gate.wait(0.005):
                if cancelled.is_set():
                    raise Cancelled
        if self.errors:
            raise self.errors.pop(0)
        if not (self.root / content_hash).is_dir():
            raise AdapterFailed(f"adapter {content_hash} is not in the store; add it again")
        shutil.copytree(self.root / content_hash, directory, dirs_exist_ok=True)
