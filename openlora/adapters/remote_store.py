"""Adapters by content below a URL: whatever fsspec has a package for, or an http(s) server to read.

    URL/<hash>/                   the files of the adapter; adapter_config.json is written last and
                                  deleted first, so that what has one is complete
    URL/.holds/<hash>/<holder>    a registry that still names it
    URL/.deletions/<hash>/<nonce> somebody is about to delete it

Who serves an adapter has it in a ``DiskCache``, which checks what it gets; nothing here trusts the
store's bytes. The same contract as ``AdapterStore``, for processes of many machines.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from openlora.adapters.adapter_config import CONFIG_FILE
from openlora.adapters.adapter_source import Cancelled
from openlora.adapters.peft_files import TOKENIZER_FILES
from openlora.adapters.peft_format import MAX_ADAPTER_BYTES, AdapterInfo, AdapterLayout
from openlora.adapters.sources import copy_files, open_url
from openlora.adapters.store import AdapterStore
from openlora.adapters.stored_file import has_file
from openlora.adapters.watched_file import FetchLimits, WatchedFile
from openlora.errors import AdapterFailed, SetupError

FETCH_TIMEOUT_S = 300.0
DELETION_S = 30.0
"""A few requests to the store; a process that has not ended them by then is dead."""
_LOOK_AGAIN_S = 0.1
_MARK_TRIES = 5
_HOLDS, _DELETIONS = ".holds", ".deletions"
_HASH = re.compile(r"[0-9a-f]{64}")


class RemoteStore:
    """The adapters below ``url``.

    Args:
        url: with a scheme.
        cache: local directory, of the ``DiskCache`` that serves its adapters.
        timeout_s: most time of one fetch.
        max_bytes: most bytes of one fetch.

    Raises:
        SetupError: the URL's package is not installed.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        timeout_s: float = FETCH_TIMEOUT_S,
        max_bytes: int = MAX_ADAPTER_BYTES,
    ) -> None:
        self.url = url.rstrip("/")
        self.scratch = cache
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._system: Any = None
        self._root = ""
        if url.partition("://")[0] in ("http", "https"):
            return  # read by urllib, see ``open_url``
        try:
            # Not at the top: a plain directory needs no fsspec.
            import fsspec

            # Listings of what others write must be fresh.
            self._system, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise SetupError(f"the adapter store {self.name} cannot be opened: {error}") from error

    @property
    def name(self) -> str:
        """The URL without a password or query."""
        return re.sub(r"(://)[^/@]*@", r"\1", self.url.partition("?")[0])

    def put(
        self,
        directory: Path,
        *,
        holder: str | None = None,
        check: Callable[[AdapterLayout], None] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> AdapterInfo:
        """As ``AdapterStore.put``.

        Raises:
            AdapterFailed: the adapter is unusable; nothing was stored.
            OSError: the store cannot be written.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=self.scratch) as temporary:
            local = AdapterStore(Path(temporary))
            info = local.put(directory, check=lambda layout: _check(layout, check))
            if announce is not None:
                announce(info.hash)
            with self._reached():
                if holder is not None:
                    # First: whoever deletes the content from now on sees that it is wanted.
                    self._writable()
                    self._mark(_HOLDS, info.hash, holder)
                    if self._wait_for_deletions(info.hash):
                        # One for the same holder, which had it unwanted, took the hold as well.
                        self._mark(_HOLDS, info.hash, holder)
                if not self._is_whole(local.path(info.hash)):
                    self._upload(local.path(info.hash), info.hash)
        return info

    def path(self, content_hash: str) -> Path:
        """Where the adapter is in the cache of this machine, or will be when it is loaded.

        Raises:
            AdapterFailed: ``content_hash`` is no hash.
        """
        return self.scratch / _checked(content_hash)

    def release(
        self, content_hash: str, holder: str, is_wanted: Callable[[], bool] = lambda: False
    ) -> bool:
        """As ``AdapterStore.release``. Raises OSError: the store does not answer."""
        with self._reached():
            system, hold = self._writable(), self._at(_HOLDS, _checked(content_hash), holder)
            if not system.exists(hold):
                return False
            # Before the holders are looked at: whoever becomes one behind that look sees this, and
            # waits until what it would have taken for stored is gone.
            mark = self._mark(_DELETIONS, content_hash, secrets.token_hex(8))
            try:
                if is_wanted():
                    return False
                system.rm_file(hold)
                if self.held(content_hash):
                    return False
                files = self._list(content_hash)
                for file in sorted(files, key=lambda name: name != CONFIG_FILE):
                    if not system.exists(mark):
                        return False  # it took so long that somebody stores the content anew
                    system.rm_file(self._at(content_hash, file))
                self._remove_folder(content_hash)
                self._remove_folder(_HOLDS, content_hash)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    system.rm_file(mark)
                self._remove_folder(_DELETIONS, content_hash)
            return True

    def held(self, content_hash: str) -> tuple[str, ...]:
        """The holders of an adapter."""
        with self._reached():
            return tuple(sorted(self._list(_HOLDS, _checked(content_hash))))

    def contents(self) -> list[str]:
        """Hashes of all adapters there. Raises OSError: it does not answer, or cannot list."""
        with self._reached():
            self._writable()
            return sorted(name for name in self._list() if _HASH.fullmatch(name))

    def sweep(self) -> int:
        """As ``AdapterStore.sweep``, of what was on its way there: the store has no such things."""
        return AdapterStore(self.scratch).sweep()

    def fetch(self, content_hash: str, directory: Path, cancelled: threading.Event) -> None:
        """As ``disk_cache.Source`` says; the bytes are not checked here."""
        limits = FetchLimits(cancelled, self._timeout_s, self._max_bytes)

        def opened(name: str) -> BinaryIO:
            try:
                file = self._open(content_hash, name)
            except FileNotFoundError as error:
                if name != CONFIG_FILE:
                    raise
                raise AdapterFailed(
                    f"adapter {content_hash} is not in the store {self.name}; add it again"
                ) from error
            return cast(BinaryIO, WatchedFile(file, limits))

        with self._reached():
            copy_files(opened, directory)

    def _open(self, content_hash: str, name: str) -> BinaryIO:
        if self._system is None:
            return open_url(f"{self.url}/{content_hash}/{name}")
        return cast(BinaryIO, self._system.open(self._at(content_hash, name), "rb"))

    def _is_whole(self, directory: Path) -> bool:
        """Whether the store has all files of ``directory`` as they are there. What it cannot read
        it has not: storing it anew fails too where nothing is reached."""
        try:
            with self._reached():
                return all(
                    has_file(self._system, self._at(directory.name, path.name), path)
                    for path in directory.iterdir()
                )
        except OSError:
            return False

    def _upload(self, directory: Path, content_hash: str) -> None:
        self._make_folder(content_hash)
        for path in sorted(directory.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            self._system.put_file(str(path), self._at(content_hash, path.name))

    def _mark(self, *parts: str) -> str:
        """Make an empty file; where it is."""
        path = self._at(*parts)
        for _ in range(_MARK_TRIES):
            self._make_folder(*parts[:-1])
            try:
                self._system.pipe_file(path, b"")
            except FileNotFoundError:
                continue  # somebody else found the folder empty, and removed it
            return path
        raise OSError(f"{'/'.join(parts)} cannot be written in {self.name}")

    def _wait_for_deletions(self, content_hash: str) -> bool:
        """Until those have ended that began before a hold was there; one that takes too long has
        died, and has its mark taken from it. Whether there were any."""
        until, had_any = time.monotonic() + DELETION_S, False
        while marks := self._list(_DELETIONS, content_hash):
            had_any = True
            if time.monotonic() < until:
                time.sleep(_LOOK_AGAIN_S)
                continue
            for mark in marks:
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(self._at(_DELETIONS, content_hash, mark))
        return had_any

    def _make_folder(self, *parts: str) -> None:
        """Where folders are more than prefixes of names."""
        with contextlib.suppress(FileExistsError, NotImplementedError):
            self._system.makedirs(self._at(*parts), exist_ok=True)

    def _remove_folder(self, *parts: str) -> None:
        """An empty one, where folders are more than prefixes of names."""
        with contextlib.suppress(OSError, NotImplementedError):
            self._system.rmdir(self._at(*parts))

    def _list(self, *parts: str) -> list[str]:
        try:
            found = self._system.ls(self._at(*parts), detail=False)
        except FileNotFoundError:
            return []
        return [str(name).rstrip("/").rpartition("/")[2] for name in found]

    def _at(self, *parts: str) -> str:
        return "/".join((self._root.rstrip("/"), *parts))

    def _writable(self) -> Any:
        if self._system is None:
            raise AdapterFailed(
                f"the adapter store {self.name} can only be read: add adapters where it is "
                "written, or name a store that takes files (s3://, gs://, a directory)"
            )
        return self._system

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Every package has errors of its own; here all but ours are ``OSError``.

        Raises:
            OSError: the store does not answer.
        """
        try:
            yield
        except (OSError, AdapterFailed, Cancelled):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def _check(layout: AdapterLayout, check: Callable[[AdapterLayout], None] | None) -> None:
    if any(name in TOKENIZER_FILES for name, _ in layout.files):
        raise AdapterFailed(
            "it has a vocabulary of its own (embed_tokens or lm_head with tokenizer.json), which a "
            "worker needs before it fetches an adapter: serve it from a store that is a directory, "
            "or without its tokenizer.json if it adds no tokens"
        )
    if check is not None:
        check(layout)


def _checked(content_hash: str) -> str:
    if not _HASH.fullmatch(content_hash):
        raise AdapterFailed(f"{content_hash[:100]!r} is no content hash (64 hex digits)")
    return content_hash
