"""Clients that never give up, and never believe what they are told: every token is checked.

Each stream asks, resumes at any gateway that lives, and compares index, token and text with those
of the undisturbed run. Anything else than "the next token, the right one" is written down.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, WebSocketException

Frame = dict[str, Any]
_LOST = (OSError, WebSocketException, InvalidHandshake, TimeoutError, asyncio.IncompleteReadError)
_RETRY_S = 0.1
_SILENCE_S = 20.0
"""A connection that says nothing for so long is given up: no client would wait longer."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose answer is known: the fields of its frame, and what must come."""

    name: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the undisturbed run gave."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Mishap:
    """Something a client should never see. ``kind``: lost, repeated, changed, failed."""

    at: float
    kind: str
    detail: str


@dataclass(slots=True)
class Stream:
    """One request of one client, over all its connections.

    Attributes:
        epoch: the claim that made the newest token, for a resume; 0 before the first.
        times: monotonic time of ``accepted`` and of each token.
        restarts: ``restarted`` notices; each empties ``token_ids`` and ``text``.
        refused_at: when it was told to try again later.
    """

    ask: Ask
    expected: Answer | None
    job_id: str | None = None
    epoch: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    reconnects: int = 0
    refused_at: list[float] = field(default_factory=list)
    mishaps: list[Mishap] = field(default_factory=list)
    finish: str | None = None
    ended_at: float | None = None

    def take(self, frame: Frame) -> bool:
        """Check one frame; True where it is the last."""
        now = time.monotonic()
        match frame["type"]:
            case "accepted":
                self.job_id = frame["job_id"]
                self.times.append(now)
            case "token":
                self._take_token(frame, now)
            case "restarted":
                self.restarts.append(now)
                self.token_ids, self.text = [], ""
            case "done":
                self.text += frame["text"]
                self.finish = frame["finish_reason"]
                self._check_end(now)
                return True
            case "error":
                self.finish = f"error {frame['code']}"
                self._mishap(now, "failed", f"{frame['code']}: {frame['message']}")
                self.ended_at = now
                return True
        return False

    def _take_token(self, frame: Frame, now: float) -> None:
        index, expected = frame["index"], len(self.token_ids)
        if index < expected:
            self._mishap(now, "repeated", f"index {index} after {expected - 1}")
            return
        if index > expected:
            self._mishap(now, "lost", f"index {index} after {expected - 1}")
            self.token_ids += [-1] * (index - expected)
        answer = self.expected
        if answer is not None and (
            index >= len(answer.token_ids) or answer.token_ids[index] != frame["token_id"]
        ):
            self._mishap(now, "changed", f"index {index} is {frame['token_id']}")
        self.times.append(now)
        self.epoch = frame.get("epoch", self.epoch)
        self.token_ids.append(frame["token_id"])
        self.text += frame["text"]

    def _check_end(self, now: float) -> None:
        self.ended_at = now
        answer = self.expected
        if answer is None:
            return
        if len(self.token_ids) < len(answer.token_ids):
            missing = len(answer.token_ids) - len(self.token_ids)
            self._mishap(now, "lost", f"ended {missing} tokens early ({self.finish})")
        elif self.text != answer.text:
            self._mishap(now, "changed", "the text is another")

    def _mishap(self, at: float, kind: str, detail: str) -> None:
        self.mishaps.append(Mishap(at, kind, f"{self.ask.name} ({self.job_id}): {detail}"))

    def was_open_at(self, moment: float) -> bool:
        """Accepted before, ended after."""
        is_accepted = bool(self.times) and self.times[0] <= moment
        return is_accepted and (self.ended_at is None or self.ended_at > moment)


class Clients:
    """Streams on a thread of their own.

    Args:
        urls: the gateways that live now; asked at each connect.
        seed: which of them a connection takes.
    """

    def __init__(self, urls: Callable[[], Sequence[str]], seed: int) -> None:
        self._urls = urls
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._run_id = f"{seed}-{time.time_ns()}"
        self.streams: list[Stream] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clients", daemon=True)
        self._thread.start()

    def begin(self, ask: Ask, expected: Answer | None) -> Stream:
        """One more stream, at once."""
        stream = Stream(ask, expected)
        self.streams.append(stream)
        asyncio.run_coroutine_threadsafe(self._follow(stream), self._loop)
        return stream

    def keep_going(self, lane: Callable[[], tuple[Ask, Answer]], lanes: int) -> Callable[[], None]:
        """``lanes`` clients that ask again when they have their answer; → what ends that."""
        stopping = threading.Event()

        async def one_lane() -> None:
            while not stopping.is_set():
                stream = Stream(*lane())
                self.streams.append(stream)
                await self._follow(stream)

        for _ in range(lanes):
            asyncio.run_coroutine_threadsafe(one_lane(), self._loop)
        return stopping.set

    def wait(self, streams: Sequence[Stream], timeout_s: float) -> None:
        """Until all of ``streams`` have ended; those that do not are written down as lost."""
        deadline = time.monotonic() + timeout_s
        while any(stream.ended_at is None for stream in streams):
            now = time.monotonic()
            if now > deadline:
                for stream in streams:
                    if stream.ended_at is None:
                        detail = f"no end within {timeout_s:g} s; {len(stream.token_ids)} tokens"
                        stream.mishaps.append(Mishap(now, "lost", f"{stream.ask.name}: {detail}"))
                return
            time.sleep(0.05)

    def close(self) -> None:
        """Drop all connections."""

        async def end_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end_all(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _follow(self, stream: Stream) -> None:
        request_id = f"r{next(self._numbers)}"
        key = f"{self._run_id}-{request_id}"
        while stream.ended_at is None:
            urls = self._urls()
            if not urls:
                await asyncio.sleep(_RETRY_S)
                continue
            url = self._random.choice(list(urls)).replace("http", "ws", 1) + "/v1/ws"
            try:
                async with connect(url, open_timeout=5, close_timeout=0.1) as socket:
                    await self._talk(stream, socket, request_id, key)
            except _LOST:
                stream.reconnects += 1
                await asyncio.sleep(_RETRY_S)

    async def _talk(
        self, stream: Stream, socket: ClientConnection, request_id: str, key: str
    ) -> None:
        """Ask, or resume, and read to the end."""
        await socket.send(json.dumps(self._opening(stream, request_id, key)))
        while True:
            frame = json.loads(await asyncio.wait_for(socket.recv(), _SILENCE_S))
            is_error = frame["type"] == "error"
            if is_error and frame.get("retriable") and not frame.get("job_id"):
                # Refused: it was not accepted, or the resume could not be answered now.
                stream.refused_at.append(time.monotonic())
                await asyncio.sleep(frame.get("retry_after_ms", 500) / 1000)
                await socket.send(json.dumps(self._opening(stream, request_id, key)))
                continue
            if stream.take(frame):
                return

    def _opening(self, stream: Stream, request_id: str, key: str) -> Frame:
        if stream.job_id is None:
            asked = {"type": "generate", "request_id": request_id, "idempotency_key": key}
            return asked | stream.ask.fields
        after = len(stream.token_ids) - 1
        return {
            "type": "resume",
            "request_id": request_id,
            "job_id": stream.job_id,
            "after": after,
            "epoch": stream.epoch,
        }


def asks(count: int, tokens: int) -> list[Ask]:
    """Requests that differ: half greedy, half seeded; every fourth with a chat and penalties."""
    made = []
    for number in range(count):
        params: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        if number % 2:
            params |= {"temperature": 0.9, "top_p": 0.95, "seed": 1000 + number}
        if number % 4 == 3:
            params |= {"repetition_penalty": 1.1, "frequency_penalty": 0.1}
        text = f"stream {number} of the storm"
        said = {"messages": [{"role": "user", "content": text}]} if number % 4 == 2 else None
        made.append(Ask(f"ask {number}", {**(said or {"prompt": text}), "params": params}))
    return made
