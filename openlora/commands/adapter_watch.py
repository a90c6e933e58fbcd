"""Registers adapters that appear, or change, in the folder that a system was started with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from redis.exceptions import RedisError

from openlora.adapters.stamp import Stamp, files_stamp
from openlora.commands.seed import Skipped, adapter_dirs
from openlora.errors import OpenLoRAError

PERIOD_S = 1.0
_REST = 20
"""A scan may take a twentieth of the time: ten thousand folders are looked at less often."""


class FolderChanges:
    """Which subfolders hold an adapter that was not handled yet. No threads, no clock.

    A folder is due when two scans in a row found it the same: what is still being copied is not
    read. One that vanished keeps its adapter registered: its content is in the store.

    Args:
        folder: its subfolders are adapters; what is there now counts as handled.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handled = {path: files_stamp(path) for path in adapter_dirs(folder)}
        self._seen: dict[Path, Stamp] = {}

    def scan(self) -> list[Path]:
        """The subfolders to register now. OSError: the folder cannot be read."""
        found = {path: files_stamp(path) for path in adapter_dirs(self._folder)}
        due = [
            path
            for path, now in found.items()
            if now != self._handled.get(path) and now == self._seen.get(path)
        ]
        self._seen = found
        self._handled = {path: at for path, at in self._handled.items() if path in found}
        self._handled |= {path: found[path] for path in due}
        return due

    def retry(self, paths: Sequence[Path]) -> None:
        """These could not be registered for a reason that may pass."""
        for path in paths:
            self._handled.pop(path, None)


class AdapterWatch:
    """A thread that scans and registers.

    Args:
        changes: what to look at.
        register: puts directories into store and registry; gives those that are unusable.
        warn: says one line to the operator.
        say: tells of what was registered.
    """

    def __init__(
        self,
        changes: FolderChanges,
        register: Callable[[Sequence[Path]], list[Skipped]],
        warn: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._changes = changes
        self._register = register
        self._warn = warn
        self._say = say
        self._stop = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="adapter-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more; an adapter that is being registered is finished first."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        wait_s = PERIOD_S
        while not self._stop.wait(wait_s):
            started = time.monotonic()
            self.look()
            wait_s = max(PERIOD_S, _REST * (time.monotonic() - started))

    def look(self) -> None:
        """One scan, and what follows from it."""
        failed: list[Path] = []
        reason: Exception | None = None
        try:
            due = self._changes.scan()
        except OSError as error:
            due, reason = [], error
        for number, path in enumerate(due):
            try:
                self._tell(path, self._register([path]))
            except RedisError as error:
                failed, reason = [*failed, *due[number:]], error
                break
            except (OSError, OpenLoRAError) as error:
                failed, reason = [*failed, path], error
            except Exception as error:  # noqa: BLE001 - whatever an adapter does ends it alone
                self._warn(f"Adapter {path.name} is left out: {error!r}")
        self._changes.retry(failed)
        if reason is not None and not self._failing:
            self._warn(f"The adapters' folder is not taken over: {reason}; tried again soon")
        self._failing = reason is not None

    def _tell(self, path: Path, skipped: Sequence[Skipped]) -> None:
        for bad in skipped:
            self._warn(f"Adapter {bad.name} is left out: {bad.reason}")
        if not skipped:
            self._say(f"Adapter {path.name} is registered")
