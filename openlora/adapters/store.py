"""Adapters on disk by content: checked once, never changed afterwards. Stdlib only.

    root/<hash>/                  the files of the adapter with that content hash
    root/.holds/<hash>/<holder>   a registry that still names it; without any it may be deleted
    root/.incoming-…, .trash-…    what is being copied in, or deleted

Several processes, and the registries of several systems, may use one root. An adapter appears in
one rename, complete, and is deleted only by the last registry that lets go of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from openlora.adapters.finite import check_finite
from openlora.adapters.peft_format import (
    AdapterInfo,
    AdapterLayout,
    ContentHash,
    describe,
    inspect_adapter,
    read_layout,
)
from openlora.errors import AdapterFailed

STALE_S = 3600.0
"""What has been coming in or going out for so long belongs to a process that died."""

_HASH = re.compile(r"[0-9a-f]{64}")
_HOLDS = ".holds"
_LOCK = ".lock"
_INCOMING = ".incoming-"
_TRASH = ".trash-"


class AdapterStore:
    """The adapters below one root directory."""

    def __init__(self, root: Path) -> None:
        self._root = Path(root)

    @property
    def name(self) -> str:
        """For messages."""
        return str(self._root)

    @property
    def scratch(self) -> Path:
        """A directory for what is on its way here."""
        return self._root

    def put(
        self,
        directory: Path,
        *,
        holder: str | None = None,
        check: Callable[[AdapterLayout], None] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> AdapterInfo:
        """Check ``directory`` and copy it into the store, unless its content is there already and
        sound.

        Args:
            holder: the registry that will name it, see ``release``.
            check: called with the layout before anything is copied; raises to refuse it.
            announce: called with the content hash before the store has it, so that it can be
                collected wherever its holder dies before it names it.

        Raises:
            AdapterFailed: the adapter is unusable; nothing was stored.
            OSError: the store cannot be written.
        """
        directory = Path(directory)
        with _source_of(directory):
            layout = read_layout(directory)
        if check is not None:
            check(layout)
        self._root.mkdir(parents=True, exist_ok=True)
        return self._copy_in(directory, layout, holder, announce)

    def path(self, content_hash: str) -> Path:
        """Directory of the adapter with this hash.

        Raises:
            AdapterFailed: ``content_hash`` is no hash, or the store does not hold it.
        """
        path = self._root / _checked(content_hash)
        if not path.is_dir():
            raise AdapterFailed(
                f"adapter {content_hash} is not in the store {self._root}; add it again"
            )
        return path

    def release(
        self, content_hash: str, holder: str, is_wanted: Callable[[], bool] = lambda: False
    ) -> bool:
        """``holder`` names the adapter no more; True where that was the last and it was deleted.

        What ``holder`` never held is left alone. ``is_wanted`` is asked when nobody can take hold
        any more: where ``holder`` announced the content meanwhile, all stays as it is.
        """
        holds = self._root / _HOLDS / _checked(content_hash)
        if not (holds / holder).is_file():
            return False
        path = self._root / content_hash
        trash = self._root / f"{_TRASH}{content_hash}-{time.time_ns()}"
        with self._locked():
            if is_wanted():
                return False
            (holds / holder).unlink()
            if any(holds.iterdir()):
                return False
            holds.rmdir()
            with contextlib.suppress(FileNotFoundError):
                path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def held(self, content_hash: str) -> tuple[str, ...]:
        """The holders of an adapter."""
        holds = self._root / _HOLDS / _checked(content_hash)
        return tuple(sorted(os.listdir(holds))) if holds.is_dir() else ()

    def sweep(self, older_than_s: float = STALE_S) -> int:
        """Delete what processes that died left half copied or half deleted; how many."""
        swept = 0
        entries = list(os.scandir(self._root)) if self._root.is_dir() else []
        for entry in entries:
            if entry.name.startswith((_INCOMING, _TRASH)):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime >= older_than_s:
                        shutil.rmtree(entry.path)
                        swept += 1
        return swept

    def _copy_in(
        self,
        directory: Path,
        layout: AdapterLayout,
        holder: str | None,
        announce: Callable[[str], None] | None,
    ) -> AdapterInfo:
        with tempfile.TemporaryDirectory(prefix=_INCOMING, dir=self._root) as temporary:
            copy = Path(temporary) / "adapter"
            copy.mkdir()
            digest = ContentHash()
            for name, size in layout.files:
                digest.begin(name, size)
                _copy_durably((directory / name).resolve(), copy / name, size, digest)
            # The copy is what gets used, so the copy is what is checked: its source may have
            # changed since.
            layout = read_layout(copy)
            for name, _ in layout.files:
                tensors = {t: entry for t, entry in layout.tensors.items() if entry.file == name}
                check_finite(copy / name, tensors)
            info = describe(layout, digest.hexdigest())
            if announce is not None:
                announce(info.hash)
            place = self._root / info.hash
            is_sound = _holds(place, info.hash)
            with self._locked():
                if not place.is_dir():
                    copy.rename(place)
                elif not is_sound:
                    # File by file: who reads it finds each of them at any moment.
                    for file in copy.iterdir():
                        file.replace(place / file.name)
                if holder is not None:
                    holds = self._root / _HOLDS / info.hash
                    holds.mkdir(parents=True, exist_ok=True)
                    (holds / holder).touch()
        return info

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Renames and holds of all processes, one at a time: nobody takes hold of what another is
        about to delete."""
        # Not at the top: gateways that never write a store run where it is missing.
        import fcntl

        with (self._root / _LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _checked(content_hash: str) -> str:
    if not _HASH.fullmatch(content_hash):
        raise AdapterFailed(f"{content_hash[:100]!r} is no content hash (64 hex digits)")
    return content_hash


def _holds(place: Path, content_hash: str) -> bool:
    """Whether this content is there, as it was stored."""
    try:
        return inspect_adapter(place).hash == content_hash
    except (AdapterFailed, OSError):
        return False


@contextlib.contextmanager
def _source_of(directory: Path) -> Iterator[None]:
    """That a source cannot be read is no fault of the store's."""
    try:
        yield
    except OSError as error:
        raise AdapterFailed(f"{directory} cannot be read: {error}; check its files") from error


def _copy_durably(source: Path, target: Path, size: int, digest: ContentHash) -> None:
    left = size
    with _source_of(source.parent):
        reader = source.open("rb")
    with reader, target.open("xb") as writer:
        while True:
            with _source_of(source.parent):
                # One byte more than expected, to see a file that has grown.
                chunk = reader.read(min(1 << 20, left + 1))
            if not chunk:
                break
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    if left:
        raise AdapterFailed(f"{source.name} changed while it was copied; add it again")
