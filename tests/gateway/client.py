"""A websocket client's side of a test."""

from __future__ import annotations

import json
import socket as socketlib
import time
from collections.abc import Callable
from typing import Any

import httpx
from websockets.sync.client import ClientConnection

from tests.gateway.running import RunningGateway

GRACE_S = 3.0
"""What a client that left has time for: jobs of one that is there must outlive a busy machine."""


def send(socket: ClientConnection, **frame: Any) -> None:
    socket.send(json.dumps(frame))


def generate(socket: ClientConnection, request_id: str, prompt: str, **fields: Any) -> None:
    send(socket, type="generate", request_id=request_id, prompt=prompt, **fields)


def receive(socket: ClientConnection, timeout: float = 30) -> dict[str, Any]:
    frame: dict[str, Any] = json.loads(socket.recv(timeout=timeout))
    return frame


def receive_all(socket: ClientConnection, request_id: str) -> list[dict[str, Any]]:
    """Frames of one request up to its last one; frames of others are dropped."""
    frames = []
    while True:
        frame = receive(socket)
        if frame["request_id"] != request_id:
            continue
        frames.append(frame)
        if frame["type"] in ("done", "error"):
            return frames


def receive_until_closed(socket: ClientConnection, frames: list[dict[str, Any]]) -> None:
    while True:
        frames.append(receive(socket))


def text_of(frames: list[dict[str, Any]]) -> str:
    """The joined text; indices must count up without a gap."""
    tokens = [frame for frame in frames if frame["type"] == "token"]
    first = tokens[0]["index"] if tokens else 0
    assert [token["index"] for token in tokens] == [*range(first, first + len(tokens))]
    return "".join(frame["text"] for frame in frames if frame["type"] in ("token", "done"))


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def metric(gateway: RunningGateway, name: str) -> float:
    lines = httpx.get(f"{gateway.url}/metrics").text.splitlines()
    start = f"openlora_gateway_{name} "
    return next(float(line.removeprefix(start)) for line in lines if line.startswith(start))


def hang_up(socket: ClientConnection) -> None:
    """Ends the connection as a lost network would: no close frame, no waiting for one."""
    socket.socket.shutdown(socketlib.SHUT_RDWR)


def small_buffers(gateway: RunningGateway) -> socketlib.socket:
    """A connection whose receiving side takes little: what the server sends soon has to wait."""
    connection = socketlib.socket()
    connection.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_RCVBUF, 8192)
    connection.connect(("127.0.0.1", gateway.port))
    return connection


def wait_for(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "never became true"
        time.sleep(0.02)
