"""The bare relay: one Redis subscription → websockets. The least a token can cost on this machine.

    python -m openlora.bench.pipeline_relay PORT REDIS_URL STREAMS

No jobs, no log, no checks: a step's message holds every stream's frame ready-made, and each is
sent on its connection. uvicorn with websockets' sans-I/O protocol on uvloop, as the gateway.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec
import redis
import redis.asyncio
import uvicorn

from workers.scripted_engine import clock_token

CHANNEL = "openlora:bench:relay"
READY_KEY = "openlora:bench:relay:ready"
"""List: gets an element once every stream has named its number."""
READY_TIMEOUT_S = 60
_TOKEN_ID = "<token>"

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class BareRelay:
    """An ASGI application: a client names its stream number, then gets that stream's frames."""

    def __init__(self, redis_url: str, streams: int) -> None:
        self._redis: Any = redis.asyncio.Redis.from_url(redis_url)
        self._streams = streams
        self._senders: dict[int, Send] = {}
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                self._senders[int(message["text"])] = send
                if len(self._senders) == self._streams:
                    await self._redis.rpush(READY_KEY, "ready")
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async def _lifespan(self, receive: Any, send: Send) -> None:
        await receive()
        pubsub = self._redis.pubsub()
        await pubsub.subscribe(CHANNEL)
        self._task = asyncio.create_task(self._relay(pubsub))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._task.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _relay(self, pubsub: Any) -> None:
        decode = msgspec.json.Decoder(list[tuple[int, str]]).decode
        senders = self._senders
        async for message in pubsub.listen():
            if message["type"] != "message":
                continue
            for number, frame in decode(message["data"]):
                await senders[number]({"type": "websocket.send", "text": frame})


def step_message(streams: int, index: int) -> bytes:
    """One step of all streams, each frame as the gateway would write it, but for the token's ID:
    ``at_time`` sets it."""
    frames = [
        (
            number,
            f'{{"type":"token","request_id":"r","job_id":"{number:026x}","index":{index},'
            f'"token_id":{_TOKEN_ID},"text":" w{20000 + number}","logprob":null}}',
        )
        for number in range(streams)
    ]
    return msgspec.json.encode(frames)


def at_time(message: bytes, now_ns: int) -> bytes:
    """``message`` with the time of the step as its tokens' IDs."""
    return message.replace(_TOKEN_ID.encode(), str(clock_token(now_ns)).encode())


def publish_steps(
    redis_url: str, messages: Sequence[bytes], steps_per_s: float, stopped: threading.Event
) -> None:
    """Publish all steps, once every stream is connected, until ``stopped``.

    ``steps_per_s``: their pace, by a schedule; 0: as fast as Redis takes them.
    """
    with redis.Redis.from_url(redis_url) as client:
        client.blpop([READY_KEY], READY_TIMEOUT_S)
        due = time.monotonic()
        for message in messages:
            if steps_per_s:
                due += 1 / steps_per_s
                if stopped.wait(max(0.0, due - time.monotonic())):
                    return
            client.publish(CHANNEL, at_time(message, time.monotonic_ns()))


def main() -> int:
    """Serve until terminated."""
    uvicorn.run(
        BareRelay(sys.argv[2], int(sys.argv[3])),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop="uvloop",
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        log_level="warning",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
