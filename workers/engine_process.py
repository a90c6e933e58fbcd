"""The engine process: reads commands, steps the engine, sends the tokens of each step.

    python -m workers.engine_process FD

FD is its end of a socket pair, inherited from the I/O process. It is a process of its own so that
the model and the I/O never wait for the same interpreter lock, and a session of its own so that
Ctrl-C reaches the I/O process alone, which drains it. It ends when the I/O process is gone.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

import msgspec

from openlora.adapters.merge_spec import MergeSpec
from openlora.adapters.tier_stats import TierStats
from openlora.engine.request import Priority, Request, TokenOutput
from openlora.errors import OpenLoRAError
from workers.engine_report import facts_of, tier_status
from workers.framing import RECEIVE_BYTES, FrameSplitter, pack_frame, receive_frame
from workers.messages import (
    Commands,
    EngineSetup,
    Fault,
    Load,
    LoadProgress,
    Output,
    SetupFailed,
    Start,
    StepOutputs,
)
from workers.scripted_engine import ScriptedEngine

if TYPE_CHECKING:
    from openlora.engine import Engine

_FIRST_FILE = 3
"""The lowest number that is no standard stream's."""
LOAD_INTERVAL_S = 0.5
PROGRESS_INTERVAL_S = 0.1
PIN_WAIT_S = 0.02
"""How often an idle engine looks whether a pinned adapter was loaded."""
SWITCH_INTERVAL_S = 0.0005
STALLED_WAIT_S = 0.001
"""Pause between steps that said nothing while every request waits (for an adapter to load)."""

logger = logging.getLogger("workers.engine")


class Stats(Protocol):
    """The part of the engine's statistics that a heartbeat carries."""

    running: int
    waiting: int
    waiting_batch: int
    resident_adapters: Sequence[str]
    tiers: Sequence[TierStats]


def build_engine(
    setup: EngineSetup, progress: Callable[[int, int], None]
) -> Engine | ScriptedEngine:
    """The engine named by ``setup.kind``; ``progress``: told of (done, total) while it loads.

    Raises:
        OpenLoRAError: it cannot start.
    """
    kind, _, rate = setup.kind.partition(":")
    if kind in ("scripted", "clock"):
        return ScriptedEngine(float(rate or 0), clock_tokens=kind == "clock")
    from openlora.engine import Engine, EngineConfig
    from openlora.engine.config import block_size_for

    config = EngineConfig(
        model=setup.model,
        device=setup.device,
        dtype=setup.dtype,
        block_size=block_size_for(setup.attention_backend),
        attention_backend=setup.attention_backend,
        merge_dir=setup.merge_dir,
        adapter_store=setup.adapter_store,
        adapter_disk_dir=setup.adapter_disk_dir,
        adapter_disk_bytes=setup.adapter_disk_bytes,
        load_format="dummy" if kind == "dummy" else "auto",
        deterministic=setup.deterministic,
        max_graph_tokens=setup.max_graph_tokens,
    )
    return Engine(config, progress=progress)


class EngineServer:
    """Commands in, step outputs out, for one engine. One thread; owns the ticket numbers."""

    def __init__(self, engine: Engine | ScriptedEngine, sock: socket.socket) -> None:
        self._engine = engine
        self._sock = sock
        self._splitter = FrameSplitter()
        self._decode = msgspec.msgpack.Decoder(Commands).decode
        self._ticket_of: dict[int, int] = {}
        self._id_of: dict[int, int] = {}
        self._failed: list[Output] = []
        self._load_due = 0.0
        self._last_load: Load | None = None

    def serve(self) -> None:
        """Run until the I/O process closes its end."""
        stalled = False
        while True:
            busy = self._engine.has_work() or bool(self._failed)
            hold_s = self._engine.launch_wait_s()
            wait_s: float | None = STALLED_WAIT_S if stalled else hold_s
            if not busy:
                # Without requests only pinned adapters are loaded; what has come of that is told
                # before the wait.
                wait_s = PIN_WAIT_S if self._engine.take_loads() else None
                self._send((), force_load=True)
            if select.select([self._sock], (), (), wait_s)[0]:
                data = self._sock.recv(RECEIVE_BYTES)
                if not data:
                    return
                for body in self._splitter.feed(data):
                    self._apply(self._decode(body))
                if hold_s and self._engine.launch_wait_s():
                    continue  # nothing of it makes the next step urgent
            outputs = self._take_failed()
            if self._engine.has_work():
                outputs += self._outputs(self._engine.step())
            stalled = not outputs and self._engine.only_waits_for_adapters()
            self._send(tuple(outputs), force_load=False)

    def _apply(self, commands: Commands) -> None:
        for name, path in commands.register:
            self._engine.register_adapter(name, path)
        if commands.pin is not None:
            self._engine.pin_adapters(commands.pin)
        for start in commands.start:
            self._start(start)
        for ticket in commands.abort:
            request_id = self._id_of.pop(ticket, None)
            if request_id is not None:
                del self._ticket_of[request_id]
                self._engine.abort(request_id)

    def _start(self, start: Start) -> None:
        request = Request(
            prompt_token_ids=start.prompt_token_ids,
            adapters=dict(start.adapters),
            params=start.params,
            output_token_ids=start.output_token_ids,
            priority=cast(Priority, start.priority),
            merge=MergeSpec(**msgspec.structs.asdict(start.merge)),
            tenant=start.tenant,
        )
        try:
            request_id = self._engine.add(request)
        except OpenLoRAError as error:
            fault = Fault(error.code, error.message)
            self._failed.append(Output(start.ticket, 0, None, fault=fault))
            return
        self._ticket_of[request_id] = start.ticket
        self._id_of[start.ticket] = request_id

    def _take_failed(self) -> list[Output]:
        failed, self._failed = self._failed, []
        return failed

    def _outputs(self, tokens: Iterable[TokenOutput]) -> Iterator[Output]:
        ticket_of = self._ticket_of
        for token in tokens:
            ticket = ticket_of.get(token.request_id)
            if ticket is None:
                continue  # aborted while its token was on its way through the device
            error = token.error
            if token.finish_reason is not None or error is not None:
                del ticket_of[token.request_id]
                del self._id_of[ticket]
            yield Output(
                ticket,
                token.index,
                token.token_id,
                token.finish_reason,
                token.logprob,
                token.top_logprobs,
                None if error is None else Fault(error.code, error.message),
            )

    def _send(self, outputs: tuple[Output, ...], *, force_load: bool) -> None:
        """Blocks while the I/O process does not read: that is the engine's backpressure."""
        load = None
        now = time.monotonic()
        if force_load or now >= self._load_due:
            stats = cast(Stats, self._engine.stats())
            load = Load(
                stats.running,
                stats.waiting,
                tuple(stats.resident_adapters),
                tuple(map(tier_status, stats.tiers)),
                stats.waiting_batch,
            )
            self._load_due = now + LOAD_INTERVAL_S
            if force_load and load == self._last_load:
                load = None
            else:
                self._last_load = load
        if outputs or load is not None:
            self._sock.sendall(pack_frame(StepOutputs(outputs, load)))


def _progress_sender(sock: socket.socket) -> Callable[[int, int], None]:
    """Tells the I/O process how far the load is: often enough to watch, and its end."""
    due = 0.0

    def report(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due or done == total:
            due = now + PROGRESS_INTERVAL_S
            sock.sendall(pack_frame(LoadProgress(done / max(1, total))))

    return report


def _low(sock: socket.socket) -> socket.socket:
    """The same socket under a small number: ``select``, which unlike ``poll`` can wait for less
    than a millisecond, takes none over 1,023, and the I/O process may have had many files."""
    # Not the number of a standard stream that is closed: what libraries print would be sent.
    low = socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, _FIRST_FILE))
    sock.close()
    return low


def _end_with_parent(sock: socket.socket) -> None:
    """End this process as soon as the other end closes, also in the middle of a load or step."""
    hang_up = select.poll()
    hang_up.register(sock, 0)  # POLLHUP is always told, and is there on every system
    hang_up.poll()
    os._exit(0)


def main() -> int:
    """Serve on the inherited socket; the exit status."""
    # Threads that load adapters work in Python too: by default one may stop a step for 5 ms.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    sock = _low(socket.socket(fileno=int(sys.argv[1])))
    splitter = FrameSplitter()
    bodies = receive_frame(sock, splitter)
    if not bodies:
        return 0
    setup = msgspec.msgpack.decode(bodies[0], type=EngineSetup)
    logging.basicConfig(
        level=setup.log_level,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    threading.Thread(target=_end_with_parent, args=(sock,), daemon=True).start()
    try:
        engine = build_engine(setup, _progress_sender(sock))
    except OpenLoRAError as error:
        sock.sendall(pack_frame(SetupFailed(error.message)))
        return 1
    sock.sendall(pack_frame(facts_of(engine)))
    # What is loaded stays: a collection that looks at it would hold up a step.
    gc.collect()
    gc.freeze()
    try:
        EngineServer(engine, sock).serve()
    except (BrokenPipeError, ConnectionResetError):
        logger.info("I/O process gone; ending")
    except Exception:
        logger.exception("engine step failed; this process ends and its jobs move to other workers")
        return 1
    return 0


def run() -> NoReturn:
    """``main``, and the end of this process with its status, whatever its threads are at: one that
    loads an adapter would keep it alive, and its jobs waiting for nothing."""
    status = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
