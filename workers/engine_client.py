"""The I/O process's side of the engine process: starts it, commands it, reads its steps."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

from openlora.errors import SetupError
from workers.framing import RECEIVE_BYTES, FrameSender, FrameSplitter
from workers.messages import (
    Commands,
    EngineSetup,
    LoadProgress,
    ModelFacts,
    SetupFailed,
    Start,
    StepOutputs,
)

SOCKET_BUFFER_BYTES = 1 << 17
"""About 20 steps of 200 tokens: what the engine may run ahead before it waits for the I/O."""
STOP_TIMEOUT_S = 5.0
GONE_TIMEOUT_S = 1.0
PROGRESS_SILENCE_S = 1.0


class EngineGone(Exception):
    """The engine process has ended; ``status`` is its exit status, negative for a signal."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"the engine process ended with status {status}")
        self.status = status


class EngineClient:
    """One engine process. Used by one thread at a time."""

    def __init__(self, setup: EngineSetup) -> None:
        self._model = setup.model
        self._splitter = FrameSplitter()
        self._decode = msgspec.msgpack.Decoder(StepOutputs).decode
        self._early: list[bytes] = []  # frames that came together with the first one
        self._known_adapters: set[str] = set()
        self._register: list[tuple[str, str]] = []
        self._start: list[Start] = []
        self._abort: list[int] = []
        self._pin: tuple[str, ...] | None = None
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
            self.sock = ours
            # A session of its own: Ctrl-C is for this process, which drains the engine.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workers.engine_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
            self._sender = FrameSender(ours)
            self._sender.send(setup)  # the load begins now, whatever else is to be reached first

    @property
    def pid(self) -> int:
        """Process ID of the engine."""
        return self._process.pid

    def wait_ready(self, on_progress: Callable[[float], None] = lambda share: None) -> ModelFacts:
        """Block until the model is loaded.

        ``on_progress``: told of the share that is loaded, 0 to 1, once a second at least.

        Raises:
            SetupError: it cannot be loaded.
        """
        decode = msgspec.msgpack.Decoder(LoadProgress | ModelFacts | SetupFailed).decode
        self.sock.settimeout(PROGRESS_SILENCE_S)
        share = 0.0
        while True:
            try:
                data = self.sock.recv(RECEIVE_BYTES)
            except TimeoutError:
                on_progress(share)
                continue
            if not data:
                status = self._process.wait()
                raise SetupError(
                    f"the engine process ended with status {status} while loading "
                    f"{self._model}; its lines above say why"
                )
            bodies = self._splitter.feed(data)
            for number, body in enumerate(bodies, start=1):
                said = decode(body)
                if isinstance(said, SetupFailed):
                    raise SetupError(said.message)
                if isinstance(said, ModelFacts):
                    self._early = bodies[number:]
                    self.sock.setblocking(False)
                    return said
                share = said.share
                on_progress(share)

    def register(self, name: str, path: str) -> None:
        """Make an adapter known under ``name`` before a start that uses it."""
        if name not in self._known_adapters:
            self._known_adapters.add(name)
            self._register.append((name, path))

    def pin(self, names: tuple[str, ...]) -> None:
        """Keep these registered adapters in pages, and no others; goes out with ``flush``."""
        self._pin = names

    def start(self, start: Start) -> None:
        """Begin a run; goes out with the next ``flush``."""
        self._start.append(start)

    def abort(self, ticket: int) -> None:
        """End a run; outputs already on their way still arrive."""
        self._abort.append(ticket)

    def flush(self) -> None:
        """Send all commands gathered since the last call as one frame. Raises EngineGone."""
        try:
            if self._register or self._start or self._abort or self._pin is not None:
                commands = Commands(
                    tuple(self._register), tuple(self._start), tuple(self._abort), self._pin
                )
                self._register, self._start, self._abort, self._pin = [], [], [], None
                self._sender.send(commands)
            else:
                self._sender.flush()
        except OSError as error:
            raise EngineGone(self._status()) from error

    @property
    def wants_write(self) -> bool:
        """Whether commands wait for room in the socket."""
        return self._sender.pending_bytes > 0

    def receive(self) -> list[StepOutputs]:
        """All steps that have arrived. Raises EngineGone when the process has ended."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            raise EngineGone(self._status())
        bodies = self._splitter.feed(data)
        if self._early:
            bodies, self._early = self._early + bodies, []
        return [self._decode(body) for body in bodies]

    def _status(self) -> int:
        """How the process ended, whose socket is closed. One that does not come to its end (a
        thread or the device holds it up) is ended here: its jobs must not wait for it."""
        try:
            return self._process.wait(GONE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return 1  # its own doing, as what made it close the socket was

    def stop(self) -> None:
        """End the process: it leaves when its socket closes, or is killed after a while."""
        self.sock.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
