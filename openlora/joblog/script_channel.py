"""The connection that a worker's scripts go over: taken from the pool once, and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
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
        return self.run_in_parts([calls])

    def run_in_parts(self, parts: Iterable[Sequence[Call]]) -> list[Any]:
        """As ``run``, for calls that are still being made: each part is sent as soon as ``parts``
        gives it, so that Redis works on it while the next is made. Replies are read at the end.
        """
        sent: list[bytes] = []
        count = 0
        coming = iter(parts)

        def talk() -> list[Any]:
            nonlocal count
            if sent:  # on a connection made anew
                connection.send_packed_command(sent)
            for calls in coming:
                data = pack_calls(calls)
                sent.append(data)
                count += len(calls)
                connection.send_packed_command([data])
            return _replies(connection, count)

        with self._lock:
            if self._connection is None:
                self._connection = self._pool.get_connection()
            connection = self._connection
            try:
                replies: list[Any] = connection.retry.call_with_retry(
                    talk, lambda error: connection.disconnect()
                )
            except BaseException:
                connection.disconnect()  # else the next caller would read replies that are not its
                raise
        return replies


def _replies(connection: Any, count: int) -> list[Any]:
    replies = []
    for _ in range(count):
        try:
            replies.append(connection.read_response())
        except redis.ResponseError as error:
            replies.append(error)
    return replies
