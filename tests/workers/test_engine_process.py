"""The engine process by itself; what it serves is tested through its client."""

from __future__ import annotations

import socket
import sys

from workers import engine_process


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
