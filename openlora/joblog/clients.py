"""Redis connections as the job log wants them: bytes replies, short time-outs, a few retries."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from openlora.errors import Overloaded, SetupError

_ASYNC_CONNECTIONS = 32
_RETRY_AFTER_MS = 1000

# RESP2: nothing here needs more, and Redis 5 speaks it. Retries cover a restart's first moments;
# they are safe because every script may be sent again. A server that died with its machine, or
# behind a proxy, resets nothing: all that shows it is an answer that does not come, and streams
# stand still until then.
_OPTIONS: dict[str, Any] = {
    "protocol": 2,
    "socket_timeout": 2,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 15,
}
_RETRIES = 3

_REFUSALS = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
)
_REFUSAL_CODES = ("MISCONF ", "NOREPLICAS ")
"""A full disk, too few replicas: redis-py has no class for these."""
_REACH_RETRY_S = 0.25


def redis_client(url: str) -> redis.Redis:
    """A client for ``JobLog``; connects at its first command.

    Raises:
        SetupError: ``url`` is no Redis URL.
    """
    try:
        return redis.Redis.from_url(url, retry=Retry(_backoff(), _RETRIES), **_OPTIONS)
    except ValueError as error:
        raise _bad_url(error) from error


def async_redis_client(url: str) -> redis.asyncio.Redis:
    """A client for ``AsyncJobLog``. Commands beyond 32 at once wait for a connection.

    Raises:
        SetupError: ``url`` is no Redis URL.
    """
    try:
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=_ASYNC_CONNECTIONS,
            timeout=5,
            retry=AsyncRetry(_backoff(), _RETRIES),
            **_OPTIONS,
        )
    except ValueError as error:
        raise _bad_url(error) from error
    pool.connection_class = _losing(pool.connection_class)
    return redis.asyncio.Redis.from_pool(pool)


def reach_redis(client: redis.Redis, timeout_s: float) -> None:
    """Ping until Redis answers: what a process does before it starts anything else.

    Raises:
        SetupError: nothing answered within ``timeout_s``, or Redis refuses the password.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            client.ping()
        except redis.AuthenticationError as error:
            raise SetupError(
                f"Redis at {_address(client)} refuses the password ({error}); "
                "set it in --redis / OPENLORA_REDIS"
            ) from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if time.monotonic() > deadline:
                raise SetupError(
                    f"Redis at {_address(client)} does not answer ({error}); "
                    "start it or set --redis / OPENLORA_REDIS"
                ) from error
            time.sleep(_REACH_RETRY_S)
        else:
            return


@contextmanager
def redis_errors(client: redis.Redis | redis.asyncio.Redis) -> Iterator[None]:
    """Turns "Redis cannot do this now" into Overloaded; a wrong command stays redis's own error."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise Overloaded(
            f"Redis at {_address(client)} does not answer ({error}); try again",
            retry_after_ms=_RETRY_AFTER_MS,
        ) from error
    except redis.ResponseError as error:
        if not isinstance(error, _REFUSALS) and not any(
            code in str(error) for code in _REFUSAL_CODES
        ):
            raise
        raise Overloaded(
            f"Redis at {_address(client)} takes no writes ({error}); try again",
            retry_after_ms=_RETRY_AFTER_MS,
        ) from error


def _losing(kind: type[Any]) -> type[Any]:
    """``kind`` of connection, which tells of its loss on every event loop in the same way.

    uvloop refuses a write to a transport that the peer closed with a RuntimeError, where asyncio's
    own loop lets it pass. redis-py takes that for a bug of its caller: it neither retries nor
    connects again, and the tasks that live by the connection would end.
    """

    class LosingConnection(kind):  # type: ignore[misc]
        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            try:
                await super().send_packed_command(command, check_health)
            except RuntimeError as error:
                raise redis.ConnectionError(f"the connection was lost: {error}") from error

    return LosingConnection


def _address(client: redis.Redis | redis.asyncio.Redis) -> str:
    options = client.connection_pool.connection_kwargs
    return str(options.get("path") or f"{options.get('host')}:{options.get('port')}")


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(cap=0.5, base=0.05)


def _bad_url(error: ValueError) -> SetupError:
    # The URL itself may hold a password, so it is not repeated.
    return SetupError(f"the Redis URL is not valid: {error}; write redis://[:password@]host:port/0")
