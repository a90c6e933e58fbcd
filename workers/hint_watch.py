"""Hears in Redis that messages are in Kafka, so that an idle worker need not look there often."""

from __future__ import annotations

import logging
import threading
from typing import Any

import redis
from redis.exceptions import RedisError

from openlora.protocol.names import MESSAGES_CHANNEL
from workers.attention import Attention

LISTEN_S = 1.0
"""What one wait takes at most: so long a stop may wait for the thread."""
RETRY_S = 0.5

logger = logging.getLogger("workers.hint_watch")


class HintWatch:
    """A thread that listens.

    Args:
        client: of the Redis where hints are said.
        attention: told of each one, and whether they are heard at all.
    """

    def __init__(self, client: redis.Redis, attention: Attention) -> None:
        self._client = client
        self._attention = attention
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen()
            except (RedisError, OSError) as error:
                self._attention.hears_hints(False)
                logger.info("event=hints_not_heard error=%r next=again", str(error))
                self._stop.wait(RETRY_S)

    def _listen(self) -> None:
        pubsub: Any = self._client.pubsub()  # type: ignore[no-untyped-call]
        with pubsub:
            pubsub.subscribe(MESSAGES_CHANNEL)
            while not self._stop.is_set():
                message = pubsub.get_message(timeout=LISTEN_S)
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    self._attention.hears_hints(True)
                self._attention.hint()  # also once behind a pause: some may have been missed
