"""The bare relay: one Redis subscription → websockets. The least a token can cost on this machine.

    python -m openlora.bench.pipeline_relay PORT REDIS_URL STREAMS

No jobs, no log, no checks: a step's message holds every stream's frame ready-made, and each is
sent on its connection. uvicorn with websockets' sans-I/O protocol on uvloop, as the gateway.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec
import redis
import redis.asyncio
import uvicorn

CHANNEL = "openlora:bench:relay"
READY_KEY = "openlora:bench:relay:ready"
"""List: gets an element once every stream has named its number."""
READY_TIMEOUT_S = 60

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
    """One step of all streams, each frame as the gateway would write it."""
    frames = [
        (
            number,
            f'{{"type":"token","request_id":"r","job_id":"{number:026x}","index":{index},'
            f'"token_id":{20000 + number},"text":" w{20000 + number}","logprob":null}}',
        )
        for number in range(streams)
    ]
    return msgspec.json.encode(frames)


def publish_steps(redis_url: str, messages: Sequence[bytes]) -> None:
    """Publish all steps as fast as Redis takes them, once every stream is connected."""
    with redis.Redis.from_url(redis_url) as client:
        client.blpop([READY_KEY], READY_TIMEOUT_S)
        for message in messages:
            client.publish(CHANNEL, message)


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
