"""``EventStream``: what is published on delivery shards, over reconnects. Pub/sub keeps nothing, so
the stream says when it may have missed something; the reader then reads the logs."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from openlora.errors import InvalidRequest
from openlora.joblog.core import knows_command
from openlora.protocol import codec, names
from openlora.protocol.events import Chunk

_IDLE_S = 10.0
"""A connection silent for this long is asked for a sign of life; the answer has as long again."""
_RETRY_S = 0.5
_MESSAGES = (b"smessage", b"message")
_LOST = (redis.ConnectionError, redis.TimeoutError, OSError)

_logger = logging.getLogger(__name__)


class EventStream:
    """Iterate it in one task; ``add`` and ``remove`` shards from any task of the same loop.

    Yields each message's chunks, and ``None`` when the subscription was lost and is whole again:
    anything may have been missed in between.
    """

    def __init__(self, client: redis.asyncio.Redis, shards: Iterable[int]) -> None:
        self._client: Any = client  # redis-py's annotations leave replies open
        pool = client.connection_pool
        # Without retries: a reconnect inside the library would go unnoticed here.
        self._pool = redis.asyncio.ConnectionPool(
            pool.connection_class,
            **{
                **pool.connection_kwargs,
                "retry": Retry(NoBackoff(), 0),
                "health_check_interval": 0,
            },
        )
        self._channels = {names.events_channel(shard) for shard in shards}
        self._confirmed: set[str] = set()
        self._waiting: defaultdict[str, list[asyncio.Future[None]]] = defaultdict(list)
        self._pubsub: Any = None  # a PubSub while connected
        self._is_sharded = False
        self._lock = asyncio.Lock()  # one (un)subscribe or connect at a time

    async def add(self, shard: int) -> None:
        """Also listen to ``shard``; returns once Redis confirmed it, which takes an iterating
        task. While Redis is away it waits for the reconnect."""
        channel = names.events_channel(shard)
        async with self._lock:
            self._channels.add(channel)
            if channel in self._confirmed:
                return
            confirmed = asyncio.get_running_loop().create_future()
            self._waiting[channel].append(confirmed)
            if self._pubsub is not None:
                # The iterating task sees a loss too, and subscribes to all channels again.
                with suppress(*_LOST):
                    await self._subscribe(self._pubsub, [channel])
        await confirmed

    async def remove(self, shard: int) -> None:
        """Listen to ``shard`` no more; messages under way may still come."""
        channel = names.events_channel(shard)
        async with self._lock:
            self._channels.discard(channel)
            self._confirmed.discard(channel)
            if self._pubsub is None:
                return
            with suppress(*_LOST):  # as in add
                if self._is_sharded:
                    await self._pubsub.sunsubscribe(channel)
                else:
                    await self._pubsub.unsubscribe(channel)

    async def aclose(self) -> None:
        """Close the connection; the iterating task should have been cancelled before."""
        await self._disconnect()
        await self._pool.disconnect()

    async def __aiter__(self) -> AsyncIterator[tuple[Chunk, ...] | None]:
        is_reconnect = False
        while True:
            try:
                pubsub = await self._connect()
                async for message in self._messages(pubsub):
                    if message is not None:
                        yield message
                    elif is_reconnect:
                        _logger.info(
                            "subscribed to events again; logs are read for what was missed"
                        )
                        yield None
            except _LOST as error:
                _logger.warning("event subscription lost (%s); it will be made again", error)
                await self._disconnect()
                await asyncio.sleep(_RETRY_S)
            is_reconnect = True

    async def _connect(self) -> Any:
        async with self._lock:
            # Asked on each connection: the server may have been replaced by another version.
            info = await self._client.execute_command("COMMAND INFO", "spublish")
            self._is_sharded = knows_command(info)
            pubsub: Any = PubSub(self._pool)
            self._pubsub = pubsub
            await pubsub.connect()
            if self._channels:
                await self._subscribe(pubsub, sorted(self._channels))
            return pubsub

    async def _disconnect(self) -> None:
        async with self._lock:
            self._confirmed.clear()
            if self._pubsub is not None:
                await self._pubsub.aclose()
                self._pubsub = None

    async def _subscribe(self, pubsub: Any, channels: list[str]) -> None:
        if self._is_sharded:
            await pubsub.ssubscribe(*channels)
        else:
            await pubsub.subscribe(*channels)

    async def _messages(self, pubsub: Any) -> AsyncIterator[tuple[Chunk, ...] | None]:
        """Chunks as they come, and None once all channels are confirmed for the first time."""
        is_whole = False
        is_idle = False
        while True:
            if not is_whole and self._channels <= self._confirmed:
                is_whole = True
                yield None
            # Not by ``get_message``, which is six calls deep: a step has several messages.
            reply = await pubsub.connection.read_response(
                timeout=_IDLE_S, disconnect_on_error=False
            )
            if reply is None:
                if is_idle:
                    raise redis.TimeoutError(f"no answer within {_IDLE_S:g} s")
                is_idle = True
                await pubsub.ping()
                continue
            is_idle = False
            if reply[0] in _MESSAGES:
                try:
                    yield codec.decode_chunks(reply[2])
                except InvalidRequest as error:
                    _logger.warning("message on %s dropped: %s", reply[1], error.message)
                continue
            message = await pubsub.handle_message(reply)
            if message["type"] in ("subscribe", "ssubscribe"):
                self._confirm(message["channel"].decode())

    def _confirm(self, channel: str) -> None:
        if channel in self._channels:  # it may have been removed since
            self._confirmed.add(channel)
        for waiting in self._waiting.pop(channel, ()):
            if not waiting.done():
                waiting.set_result(None)
