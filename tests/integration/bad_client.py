"""A websocket client that may send anything, and what a test wants of the answers."""

from __future__ import annotations

import json
import socket as socketlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from kafka import KafkaConsumer, TopicPartition
from websockets.sync.client import connect

from openlora.protocol.names import DEAD_TOPIC

Frame = dict[str, Any]


class Client:
    """One connection. ``key``: the API key; ``headers`` instead of it are sent as they are."""

    def __init__(
        self, url: str, key: str = "", *, headers: Mapping[str, str] | None = None
    ) -> None:
        self._connect = connect(
            url.replace("http", "ws") + "/v1/ws",
            additional_headers={"Authorization": f"Bearer {key}"} if headers is None else headers,
            max_size=None,
            open_timeout=30,
        )

    def __enter__(self) -> Self:
        self._socket = self._connect.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def hang_up(self) -> None:
        """As a lost network: no close frame, which would wait behind all that was not read."""
        self._socket.socket.shutdown(socketlib.SHUT_RDWR)

    def send_text(self, text: str) -> None:
        self._socket.send(text)

    def send(self, **frame: Any) -> None:
        self._socket.send(json.dumps(frame))

    def generate(self, request_id: str, **fields: Any) -> None:
        self.send(type="generate", request_id=request_id, **fields)

    def receive(self, timeout_s: float = 60) -> Frame:
        frame: Frame = json.loads(self._socket.recv(timeout=timeout_s))
        return frame

    def until_ends(self, request_ids: Iterable[str]) -> dict[str, list[Frame]]:
        """The frames of each request up to its last; frames of others are dropped."""
        frames: dict[str, list[Frame]] = {request_id: [] for request_id in request_ids}
        running = set(frames)
        while running:
            frame = self.receive()
            if frame["request_id"] in running:
                frames[frame["request_id"]].append(frame)
                if frame["type"] in ("done", "error"):
                    running.discard(frame["request_id"])
        return frames

    def until_end(self, request_id: str) -> list[Frame]:
        return self.until_ends([request_id])[request_id]

    def run(self, request_id: str, **fields: Any) -> list[Frame]:
        self.generate(request_id, **fields)
        return self.until_end(request_id)


def token_ids(frames: Iterable[Frame]) -> list[int]:
    return [frame["token_id"] for frame in frames if frame["type"] == "token"]


def text_of(frames: Iterable[Frame]) -> str:
    """The joined text of a whole stream; its indices must count from 0 without a gap."""
    frames = list(frames)
    tokens = [frame for frame in frames if frame["type"] == "token"]
    assert [frame["index"] for frame in tokens] == list(range(len(tokens)))
    assert frames[-1]["type"] == "done", frames[-1]
    return "".join(frame["text"] for frame in tokens) + str(frames[-1]["text"])


def read_dead_letters(
    kafka: str, partition: int, offsets: Iterable[int], timeout_s: float = 30
) -> dict[int, dict[str, Any]]:
    """The dead topic's entries of these messages of a job topic, by offset; waits for them."""
    consumer = KafkaConsumer(
        bootstrap_servers=kafka,
        auto_offset_reset="earliest",
        consumer_timeout_ms=int(timeout_s * 1000),
    )
    consumer.assign([TopicPartition(DEAD_TOPIC, 0)])
    letters: dict[int, dict[str, Any]] = {}
    missing = set(offsets)
    for message in consumer:
        letter = json.loads(message.value)
        if letter["partition"] == partition and letter["offset"] in missing:
            missing.discard(letter["offset"])
            letters[letter["offset"]] = letter
        if not missing:
            break
    consumer.close()
    assert not missing, f"no letter for offsets {sorted(missing)}"
    return letters
