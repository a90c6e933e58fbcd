"""One server as a child process: start, wait until it answers, stop; it never outlives us."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openlora.errors import SetupError

HOST = "127.0.0.1"
_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1
_OUTPUT_TAIL_BYTES = 2000


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class ServerSpec:
    """What to run and how to tell that it works.

    Attributes:
        name: for messages, "embedded broker".
        argv: program and arguments. Secrets do not belong here: any user of the machine sees them.
        port: the TCP port it will listen on at 127.0.0.1.
        address: what a client is given: "host:port" or a Redis URL.
        is_ready: True once the server answers a real request; never raises, never blocks for long.
        stdin: configuration handed over on standard input, which only the child can read.
        env: variables added to our environment.
    """

    name: str
    argv: tuple[str, ...]
    port: int
    address: str
    is_ready: Callable[[], bool]
    stdin: bytes = field(default=b"", repr=False)
    env: Mapping[str, str] = field(default_factory=dict)


class ServerProcess:
    """A server of ours, in its own session so that Ctrl-C reaches us alone and we stop it in order.

    On Linux the child is killed when the *thread* that called ``start`` ends, however it ends
    (PR_SET_PDEATHSIG), SIGKILL included: call ``start`` from a thread that lives as long as the
    server should. On other systems a parent that is killed leaves the child behind.

    Output goes to ``log_path``; ``SetupError`` carries its end when the server does not start.
    """

    def __init__(self, spec: ServerSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self._child: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"ServerProcess({self.spec.name}, {self.spec.port}, pid {self.pid})"

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """What a client connects to; the same after a restart."""
        return self.spec.address

    @property
    def pid(self) -> int | None:
        """Process ID of the newest child, dead or alive; None before the first start."""
        return None if self._child is None else self._child.pid

    def poll(self) -> int | None:
        """Exit status of the child (negative: the signal), None while it runs or before a start."""
        return None if self._child is None else self._child.poll()

    def start(self, timeout_s: float = 20.0) -> None:
        """Spawn the server and return once it answers. Again after its death: a restart.

        Raises:
            SetupError: the port is taken, the program is missing, it exited, or it did not answer
                within ``timeout_s``; no child is left behind.
        """
        if self._child is not None and self._child.poll() is None:
            raise RuntimeError(f"{self.spec.name} is running already, pid {self._child.pid}")
        self._check_port()
        self._child = self._spawn()
        deadline = time.monotonic() + timeout_s
        while not self.spec.is_ready():
            status = self._child.poll()
            if status is not None:
                raise SetupError(f"{self.spec.name} exited with status {status}: {self._output()}")
            if time.monotonic() > deadline:
                self.stop(grace_s=0)
                raise SetupError(
                    f"{self.spec.name} did not answer within {timeout_s:g} s: {self._output()}"
                )
            time.sleep(_POLL_S)

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after ``grace_s``; returns with the child gone. May be repeated."""
        child = self._child
        if child is None or child.poll() is not None:
            return
        if grace_s > 0:
            end_child(child, grace_s)
        else:
            child.kill()
            child.wait()

    def kill(self) -> None:
        """SIGKILL now: what a crash looks like to everybody else."""
        self.stop(grace_s=0)

    def _check_port(self) -> None:
        with socket.socket() as probe:
            # As servers do; without it a port just given up by our own child counts as taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, self.spec.port))
            except OSError as error:
                raise SetupError(
                    f"{self.spec.name} cannot use port {self.spec.port} of {HOST}: "
                    f"{error.strerror}; stop what listens there or choose another port"
                ) from error

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log_path.open("wb") as log:
                child = subprocess.Popen(
                    self.spec.argv,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.spec.env},
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                )
        except OSError as error:
            raise SetupError(
                f"{self.spec.name} cannot be started from {self.spec.argv[0]}: {error.strerror}"
            ) from error
        assert child.stdin is not None
        try:
            child.stdin.write(self.spec.stdin)
            child.stdin.close()
        except BrokenPipeError:
            pass  # it exited at once; the wait for readiness reports that with its output
        return child

    def _output(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _OUTPUT_TAIL_BYTES))
            text = log.read().decode("utf-8", "replace").strip()
        return text or f"it printed nothing ({self.log_path})"


def end_child(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM, then SIGKILL after ``grace_s``; returns with the child gone."""
    child.terminate()
    try:
        child.wait(grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def die_with_parent() -> Callable[[], None] | None:
    """What the child runs between fork and exec, so that it is killed when our thread ends."""
    if sys.platform != "linux":
        return None
    # Loaded before the fork: afterwards only calls that need no lock are safe.
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def preexec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl: nobody would tell us
            os._exit(1)

    return preexec
