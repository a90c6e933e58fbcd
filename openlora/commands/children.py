"""The processes that ``openlora up`` keeps alive: workers, the gateway, embedded servers.

A worker or gateway runs in its own session, so that Ctrl-C reaches the supervisor alone and the
order of shutdown is the supervisor's. On Linux it is killed when the supervisor dies, SIGKILL
included.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from openlora.errors import SetupError
from openlora.local import ServerProcess
from openlora.local.process import die_with_parent

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
STEADY_AFTER_S = 60.0
_LAST_WORDS_BYTES = 8000
_LOG_PREFIX = re.compile(r"^[\d-]+ [\d:,]+ (?:(?:WARNING|ERROR|CRITICAL) [\w.]+:? )?")
_NEWS = re.compile(r"(?:INFO|DEBUG) ")


class Backoff:
    """When to start again what died: each wait doubles, a minute of life resets it."""

    def __init__(self) -> None:
        self._wait_s = FIRST_WAIT_S
        self._started_at = 0.0
        self.restart_at: float | None = None
        """Monotonic seconds of the planned restart; None while nothing is planned."""

    def started(self) -> None:
        """The process was started just now."""
        self._started_at = time.monotonic()
        self.restart_at = None

    def died(self) -> float:
        """It was found dead: plan the restart. Returns the wait in seconds."""
        now = time.monotonic()
        if now - self._started_at > STEADY_AFTER_S:
            self._wait_s = FIRST_WAIT_S
        wait_s = self._wait_s
        self._wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self.restart_at = now + wait_s
        return wait_s


class Part(Protocol):
    """One process of the system, as the supervisor sees it.

    ``consequence`` says what its death means for the users' work.
    """

    name: str
    consequence: str
    backoff: Backoff

    @property
    def running(self) -> bool:
        """Whether its process lives."""

    @property
    def status(self) -> int | None:
        """Exit status (negative: the signal) of the newest process; None while it runs."""

    @property
    def log_path(self) -> Path:
        """Where its output goes."""

    def start(self) -> None:
        """Start it. Raises SetupError where that cannot be."""

    def terminate(self) -> None:
        """Ask it to drain and exit; returns at once."""

    def kill(self) -> None:
        """End it at once, with all that it started; returns with it gone."""


class Child:
    """A worker or the gateway: ``python -m openlora …``."""

    def __init__(
        self,
        name: str,
        consequence: str,
        argv: Sequence[str],
        environ: Mapping[str, str],
        log_path: Path,
    ) -> None:
        self.name = name
        self.consequence = consequence
        self.backoff = Backoff()
        self._argv = list(argv)
        self._environ = dict(environ)
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_bytes(b"")

    @property
    def log_path(self) -> Path:
        return self._log_path

    @property
    def pid(self) -> int | None:
        """Process ID of the newest process; None before the first start."""
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def status(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def terminate(self) -> None:
        if self._process is not None and self.running:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is None:
            return
        # The process leads its own session, so its group holds what it spawned.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class EmbeddedServer:
    """The embedded broker or Redis; ``after_restart`` rebuilds what it kept in memory."""

    def __init__(
        self, server: ServerProcess, consequence: str, after_restart: Callable[[], None]
    ) -> None:
        self.name = f"the {server.spec.name}"
        self.consequence = consequence
        self.backoff = Backoff()
        self._server = server
        self._after_restart = after_restart

    @property
    def log_path(self) -> Path:
        return self._server.log_path

    @property
    def running(self) -> bool:
        return self._server.pid is not None and self._server.poll() is None

    @property
    def status(self) -> int | None:
        return self._server.poll()

    def start(self) -> None:
        is_restart = self._server.pid is not None
        self._server.start()
        if is_restart:
            try:
                self._after_restart()
            except SetupError:
                self._server.kill()
                raise

    def terminate(self) -> None:
        # Nothing of ours depends on it any more when it is asked to go: no drain to wait for.
        self._server.stop()

    def kill(self) -> None:
        self._server.kill()


def how_it_ended(status: int | None) -> str:
    """An exit status in words: "was killed by SIGKILL" or "exited with status 1"."""
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"


def last_words(log_path: Path, status: int | None) -> str:
    """Why a process says it ended: the last line of its log that is more than news.

    "" where there is none, and after a signal, which leaves no time to say anything.
    """
    if not log_path.exists() or (status is not None and status < 0):
        return ""
    with log_path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
        lines = log.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        words = _LOG_PREFIX.sub("", line.strip()).removeprefix("openlora: ")
        if words and not _NEWS.match(words):
            return words
    return ""
