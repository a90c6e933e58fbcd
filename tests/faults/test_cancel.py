"""A cancel is heard by whoever has the job by then: after a failover, and in the middle of one."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest
from websockets.sync.client import ClientConnection, connect

from openlora.bench import chaos_faults as faults

pytestmark = [pytest.mark.services, pytest.mark.long, pytest.mark.timeout(120)]

STREAMS = 16
FAILOVER_S = 25.0
"""Session timeout, what the embedded broker takes beyond it, and a machine that is busy."""


class Watched:
    """Streams of one connection: how many tokens each has, and how it ended."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.tokens = dict.fromkeys((f"r{number}" for number in range(STREAMS)), 0)
        self.ends: dict[str, dict] = {}
        params = {"max_tokens": 100_000, "ignore_eos": True, "temperature": 0}
        for request_id in self.tokens:
            self.send(type="generate", request_id=request_id, prompt=request_id, params=params)

    def send(self, **frame: object) -> None:
        self.socket.send(json.dumps(frame))

    def cancel_all(self) -> None:
        for request_id in self.tokens:
            self.send(type="cancel", request_id=request_id)

    def read_until(self, is_true, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true():
            frame = json.loads(self.socket.recv(timeout=deadline - time.monotonic()))
            request_id = frame["request_id"]
            if frame["type"] == "token":
                assert frame["index"] == self.tokens[request_id]
                self.tokens[request_id] += 1
            elif frame["type"] in ("done", "error"):
                self.ends[request_id] = frame

    def read_on(self, count: int, timeout_s: float) -> None:
        """Until each stream has ``count`` tokens more."""
        wanted = {request_id: have + count for request_id, have in self.tokens.items()}
        self.read_until(lambda: all(self.tokens[r] >= wanted[r] for r in wanted), timeout_s)

    def check_cancelled(self, timeout_s: float) -> None:
        self.read_until(lambda: len(self.ends) == STREAMS, timeout_s)
        for request_id, end in self.ends.items():
            assert end.get("finish_reason") == "cancelled", end
            assert end["usage"]["completion_tokens"] == self.tokens[request_id]


@pytest.fixture
def watched(storm):
    url = storm.system.urls()[0].replace("http", "ws", 1) + "/v1/ws"
    with connect(url) as socket:
        watched = Watched(socket)
        watched.read_on(3, 30)
        yield watched
    storm.system.wait_ready()


def test_after_a_failover(storm, watched):
    faults.kill_whole_worker(storm.system, random.Random(1))
    watched.read_on(5, FAILOVER_S)
    watched.cancel_all()
    watched.check_cancelled(FAILOVER_S)


def test_while_nobody_has_the_job(storm, watched):
    worker = storm.system.workers[0]
    worker.signal(signal.SIGKILL)
    watched.cancel_all()
    watched.check_cancelled(FAILOVER_S)
    storm.system.wait_until(lambda: not worker.running, 60)
    worker.start()
