"""A word by pub/sub that messages are in Kafka, for workers that got none for a while.

They look there rarely. Nothing depends on a hint: where one is lost, a job waits half a second at
most, and only at a worker that had nothing to do.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress

import redis
import redis.asyncio
from redis.exceptions import RedisError

from openlora.protocol.names import MESSAGES_CHANNEL

EVERY_S = 0.1
"""From one hint of a process to the next at least."""
HOLDS_S = 0.3
"""Who hears one looks out for so long: for what came behind it without a hint of its own."""

logger = logging.getLogger(__name__)


class AsyncHints:
    """A gateway's. Belongs to one event loop."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._due = 0.0

    async def say(self) -> None:
        """Something was published; never raises."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + EVERY_S
        try:
            await self._client.publish(MESSAGES_CHANNEL, b"")
        except (RedisError, OSError) as error:
            logger.info("event=hint_not_said error=%r next=workers_look_anyway", str(error))


def say(client: redis.Redis) -> None:
    """The same of a process without an event loop, which publishes much at a time."""
    with suppress(RedisError, OSError):
        client.publish(MESSAGES_CHANNEL, b"")
