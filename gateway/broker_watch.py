"""Whether the Kafka broker answers, and its topics kept in place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from gateway.threads import in_daemon_thread
from openlora.errors import Overloaded, SetupError
from producer.topics import TopicKeeper

log = logging.getLogger(__name__)

PERIOD_S = 2.0
RETRY_AFTER_MS = 1000


class BrokerWatch:
    """A ``TopicKeeper`` that sweeper and health check share. Used on one event loop.

    Attributes:
        answers: whether the broker answered when it was asked last.
        partitions: how many each topic had then.
    """

    def __init__(self, topics: TopicKeeper) -> None:
        self._topics = topics
        self._lock = asyncio.Lock()  # a keeper's connection serves one call at a time
        self.answers = True
        self.partitions: Mapping[str, int] = {}

    async def ensure(self) -> int:
        """Makes missing topics; → how often job topics were lost so far.

        Raises:
            SetupError: the broker does not answer, or refuses.
        """
        async with self._lock:
            try:
                self.partitions = await in_daemon_thread(self._topics.ensure)
            except SetupError:
                self.answers = False
                raise
            self.answers = True
            return self._topics.losses

    async def scale(self, partitions: int) -> dict[str, int]:
        """Adds partitions to the job topics; → partitions by topic.

        Raises:
            InvalidRequest: a topic has more already, or the broker cannot add any.
            Overloaded: the broker does not answer.
        """
        async with self._lock:
            try:
                counts = await in_daemon_thread(lambda: self._topics.scale(partitions))
            except SetupError as error:
                raise Overloaded(error.message, retry_after_ms=RETRY_AFTER_MS) from error
            self.partitions = {**self.partitions, **counts}
            return counts

    async def run(self) -> None:
        """Asks now and then, until cancelled."""
        while True:
            answered = self.answers
            try:
                await self.ensure()
            except SetupError as error:
                if answered:
                    log.warning("%s; asked again every %g s", error.message, PERIOD_S)
            await asyncio.sleep(PERIOD_S)
