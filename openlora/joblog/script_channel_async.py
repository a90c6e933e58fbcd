"""The connection that a gateway's scripts go over: one for all tasks, each batch in one write."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio

from openlora.joblog.script_channel import pack_calls
from openlora.joblog.scripts import Call

_Waiting = tuple[bytes, int, "asyncio.Future[list[Any]]"]


class AsyncScriptChannel:
    """Sends calls of any tasks and reads their replies, which come in the order of the calls.

    What comes while an exchange is under way goes with the next one. redis-py's pipeline takes a
    connection of its own for each: a request's three calls cost the event loop more than all else
    that it does for a request. A failed exchange is tried again as the client's ``retry`` says.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._pool: Any = client.connection_pool  # redis-py's annotations leave replies open
        self._connection: Any = None
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def run(self, calls: Sequence[Call]) -> list[Any]:
        """The calls' replies; an error that Redis answers with stands in its call's place.

        Raises:
            redis.ConnectionError, redis.TimeoutError, OSError: Redis did not answer.
        """
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((pack_calls(calls), len(calls), future))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Exchanges until nothing waits any more."""
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                replies = await self._exchange(batch)
            except BaseException as error:
                # not Exception alone: whoever waits must not wait for ever for a cancelled task
                is_own = isinstance(error, Exception)
                for _, _, future in batch + ([] if is_own else self._waiting):
                    if not future.done():
                        future.set_exception(error if is_own else redis.ConnectionError("closed"))
                if not is_own:
                    self._waiting, self._task = [], None
                    raise
                continue
            start = 0
            for _, count, future in batch:
                if not future.done():  # its task may have been cancelled
                    future.set_result(replies[start : start + count])
                start += count
        self._task = None

    async def _exchange(self, batch: Sequence[_Waiting]) -> list[Any]:
        if self._connection is None:
            self._connection = await self._pool.get_connection()
        connection = self._connection
        data = b"".join([data for data, _, _ in batch])
        count = sum(count for _, count, _ in batch)

        async def talk() -> list[Any]:
            await connection.send_packed_command([data])
            replies = []
            for _ in range(count):
                try:
                    replies.append(await connection.read_response())
                except redis.ResponseError as error:
                    replies.append(error)
            return replies

        async def failed(error: Exception) -> None:
            await connection.disconnect()

        replies: list[Any] = await connection.retry.call_with_retry(talk, failed)
        return replies
