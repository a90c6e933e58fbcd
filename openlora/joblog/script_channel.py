"""The connection that a worker's scripts go over: taken from the pool once, and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import redis
from hiredis import pack_command

from openlora.joblog.scripts import Call


def pack_calls(calls: Sequence[Call]) -> bytes:
    """The calls as Redis reads them."""
    # hiredis takes a tuple of any length; its annotation names one of one element
    pack: Callable[[tuple[Any, ...]], bytes] = pack_command
    return b"".join([pack(("EVALSHA", *call.evalsha)) for call in calls])


class ScriptChannel:
    """Sends calls together and reads their replies. Thread-safe: one exchange at a time.

    redis-py's pipeline takes a connection from the pool each time, asks the system whether it still
    lives, and keeps statistics: a third of what a step costs the thread that logs it. Here only
    the exchange is left; one that fails is tried again as the client's ``retry`` says, on the
    connection made anew.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._pool: Any = client.connection_pool  # redis-py's annotations leave replies open
        self._connection: Any = None
        self._lock = threading.Lock()

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """The calls' replies; an error that Redis answers with stands in its call's place.

        Raises:
            redis.ConnectionError, redis.TimeoutError, OSError: Redis did not answer.
        """
        data = pack_calls(calls)
        with self._lock:
            if self._connection is None:
                self._connection = self._pool.get_connection()
            connection = self._connection
            replies: list[Any] = connection.retry.call_with_retry(
                lambda: _exchange(connection, data, len(calls)),
                lambda error: connection.disconnect(),
            )
        return replies


def _exchange(connection: Any, data: bytes, count: int) -> list[Any]:
    connection.send_packed_command([data])
    replies = []
    for _ in range(count):
        try:
            replies.append(connection.read_response())
        except redis.ResponseError as error:
            replies.append(error)
    return replies
