"""The engine process by itself; what it serves is tested through its client."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import msgspec
import pytest

from openlora.sampling_params import SamplingParams
from workers import engine_process
from workers.engine_process import EngineServer
from workers.framing import FrameSplitter, pack_frame, receive_frame
from workers.messages import Commands, Start, StepOutputs
from workers.scripted_engine import ScriptedEngine


def test_a_thread_that_loads_an_adapter_does_not_keep_a_step_waiting_for_long(monkeypatch):
    ours, theirs = socket.socketpair()
    ours.close()
    monkeypatch.setattr(sys, "argv", ["engine_process", str(theirs.detach())])
    usual_s = sys.getswitchinterval()
    try:
        assert engine_process.main() == 0
        assert sys.getswitchinterval() <= 0.001
    finally:
        sys.setswitchinterval(usual_s)


def test_its_socket_does_not_take_the_place_of_a_standard_stream_that_is_closed():
    """In a process of its own: what is closed there is this one's standard error."""
    code = (
        "import os, socket; from workers.engine_process import _low; "
        "ours, theirs = socket.socketpair(); os.close(2); low = _low(theirs); "
        "ours.sendall(b'x'); assert low.recv(1) == b'x'; print(low.fileno())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 2 < int(done.stdout) < 1024


class HeldEngine(ScriptedEngine):
    """Its next launch can wait for a minute where nothing but lines runs."""

    stepped = 0.0

    def step(self):
        self.stepped = time.monotonic()
        return super().step()

    def launch_wait_s(self):
        if any(run.request.priority != "batch" for run in self._runs.values()):
            return 0.0
        return max(0.0, self.stepped + 60.0 - time.monotonic())


def test_a_step_that_can_wait_is_put_off_until_somebody_asks():
    ours, theirs = socket.socketpair()

    def serve():
        with suppress(ConnectionError):  # as ``main`` does: we go while it talks
            EngineServer(HeldEngine(), theirs).serve()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    params = SamplingParams(max_tokens=2**20)

    def start(ticket, priority):
        ours.sendall(pack_frame(Commands(start=(Start(ticket, (1,), params, priority=priority),))))

    splitter, steps = FrameSplitter(), []

    def read(timeout_s):
        ours.settimeout(timeout_s)
        for body in receive_frame(ours, splitter):
            steps.append(msgspec.msgpack.decode(body, type=StepOutputs))
        return [output.ticket for step in steps for output in step.outputs]

    assert read(30) == []  # what it tells of itself while it is idle
    start(1, "batch")
    assert read(30) == [1]  # nothing was in flight before
    start(2, "batch")
    with pytest.raises(TimeoutError):
        read(0.3)
    start(3, "interactive")
    assert read(30)[:4] == [1, 1, 2, 3]
    ours.close()
    server.join(30)
    assert not server.is_alive()
