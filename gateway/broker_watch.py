"""Whether the Kafka broker answers, and its topics kept in place."""

from __future__ import annotations

import asyncio
import logging
import threading

from openlora.errors import SetupError
from producer.topics import TopicKeeper

log = logging.getLogger(__name__)

PERIOD_S = 2.0


class BrokerWatch:
    """A ``TopicKeeper`` that sweeper and health check share.

    Attributes:
        answers: whether the broker answered when it was asked last.
    """

    def __init__(self, topics: TopicKeeper) -> None:
        self._topics = topics
        self._lock = threading.Lock()  # a keeper's connection serves one thread at a time
        self.answers = True

    def ensure(self) -> dict[str, int]:
        """Makes missing topics; → partitions by topic. Blocks.

        Raises:
            SetupError: the broker does not answer, or refuses.
        """
        with self._lock:
            try:
                counts = self._topics.ensure()
            except SetupError:
                self.answers = False
                raise
            self.answers = True
            return counts

    async def run(self) -> None:
        """Asks now and then, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            answered = self.answers
            try:
                await asyncio.to_thread(self.ensure)
            except SetupError as error:
                if answered:
                    log.warning("%s; asked again every %g s", error.message, PERIOD_S)

    def close(self) -> None:
        """Closes the connection."""
        with self._lock:
            self._topics.close()
