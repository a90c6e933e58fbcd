"""One lock for each adapter of a directory, between threads and between processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class ContentLocks:
    """Files of ``directory`` that are locked, one for each name; made when they are needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def shared(self, name: str) -> Iterator[None]:
        """Wait until nobody has it alone."""
        with self._waited_for(name, fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait until nobody else has it."""
        with self._waited_for(name, fcntl.LOCK_EX):
            yield

    @contextlib.contextmanager
    def alone_now(self, name: str) -> Iterator[bool]:
        """False where somebody has it."""
        with self._file(name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield self._is_current(name, file)

    def remove(self, name: str) -> None:
        """What was locked is gone; for whoever has the lock alone."""
        (self._directory / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _waited_for(self, name: str, kind: int) -> Iterator[None]:
        while True:
            with self._file(name) as file:
                fcntl.flock(file, kind)
                if self._is_current(name, file):
                    yield
                    return

    @contextlib.contextmanager
    def _file(self, name: str) -> Iterator[int]:
        """Its descriptor. A file object and a look for the directory would be eight system calls
        where this is two, and behind each the interpreter's lock is waited for."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            file = os.open(self._directory / name, flags, 0o666)
        except FileNotFoundError:
            self._directory.mkdir(parents=True, exist_ok=True)
            file = os.open(self._directory / name, flags, 0o666)
        try:
            yield file
        finally:
            os.close(file)

    def _is_current(self, name: str, file: int) -> bool:
        """Whether the lock still is this file: it may have been removed while it was waited for."""
        try:
            return os.path.samestat(os.fstat(file), (self._directory / name).stat())
        except FileNotFoundError:
            return False
