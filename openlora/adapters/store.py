"""Adapters on disk by content: checked once, never changed afterwards. Stdlib only."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from openlora.adapters.peft_format import AdapterInfo, describe, read_layout
from openlora.errors import AdapterFailed

_HASH = re.compile(r"[0-9a-f]{64}")


class AdapterStore:
    """``root/<hash>/`` holds the files of the adapter with that content hash.

    Several processes may use one root: an adapter appears there in one rename, complete.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(root)

    def put(self, directory: Path) -> AdapterInfo:
        """Check ``directory`` and copy it into the store, unless its content is there already.

        Raises:
            AdapterFailed: the adapter is unusable; nothing was stored.
            OSError: the store cannot be written.
        """
        directory = Path(directory)
        names = read_layout(directory).files
        self._root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=self._root) as temporary:
            copy = Path(temporary) / "adapter"
            copy.mkdir()
            for name in names:
                _copy_durably((directory / name).resolve(), copy / name)
            # The copy is what gets used, so the copy is what counts: its source may have changed.
            info = describe(copy, read_layout(copy))
            target = self._root / info.hash
            try:
                copy.rename(target)
            except OSError:
                # Somebody else put the same content there first: theirs is as good.
                if not target.is_dir():
                    raise
        return info

    def path(self, content_hash: str) -> Path:
        """Directory of the adapter with this hash.

        Raises:
            AdapterFailed: ``content_hash`` is no hash, or the store does not hold it.
        """
        if not _HASH.fullmatch(content_hash):
            raise AdapterFailed(f"{content_hash[:100]!r} is no content hash (64 hex digits)")
        path = self._root / content_hash
        if not path.is_dir():
            raise AdapterFailed(
                f"adapter {content_hash} is not in the store {self._root}; add it again"
            )
        return path


def _copy_durably(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
