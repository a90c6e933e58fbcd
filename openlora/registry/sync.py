"""``AdapterRegistry``: the blocking shell, for workers and the command line."""

from __future__ import annotations

from typing import Any

import redis

from openlora.protocol.codec import decode_adapter_record
from openlora.protocol.names import ADAPTERS_CHANNEL, ADAPTERS_KEY
from openlora.protocol.status import AdapterRecord
from openlora.registry.records import (
    check_adapter_id,
    fields_of,
    next_record,
    records_of,
    version_field,
)


class AdapterRegistry:
    """Adapter records in Redis; every change is published on ``ADAPTERS_CHANNEL``.

    The client must return bytes (``decode_responses=False``, redis-py's default).
    """

    def __init__(self, client: redis.Redis) -> None:
        # redis-py types each command as "the answer or an awaitable of it"
        self._redis: Any = client

    def get(self, adapter_id: str) -> AdapterRecord | None:
        """The newest version of ``adapter_id``; None where it is not registered."""
        value = self._redis.hget(ADAPTERS_KEY, adapter_id)
        return None if value is None else decode_adapter_record(value)

    def list(self) -> list[AdapterRecord]:
        """The newest version of every adapter, by ID."""
        return records_of(self._redis.hgetall(ADAPTERS_KEY))

    def put(self, record: AdapterRecord) -> AdapterRecord:
        """Registers ``record`` and returns it with its version; ``record.version`` is ignored.

        Content that the newest version already has makes no new version: that one is returned.

        Raises:
            InvalidRequest: the ID is malformed.
        """
        check_adapter_id(record.id)

        def change(pipe: Any) -> AdapterRecord:
            newest, last_version = pipe.hmget(ADAPTERS_KEY, record.id, version_field(record.id))
            stored = next_record(record, newest, last_version)
            pipe.multi()
            if stored is None:
                return decode_adapter_record(newest)
            pipe.hset(ADAPTERS_KEY, mapping=fields_of(stored))
            pipe.publish(ADAPTERS_CHANNEL, record.id)
            return stored

        result: AdapterRecord = self._redis.transaction(
            change, ADAPTERS_KEY, value_from_callable=True
        )
        return result

    def remove(self, adapter_id: str) -> bool:
        """Forgets ``adapter_id``; False where it was not registered. Running jobs keep it."""
        removed = bool(self._redis.hdel(ADAPTERS_KEY, adapter_id))
        if removed:
            self._redis.publish(ADAPTERS_CHANNEL, adapter_id)
        return removed
