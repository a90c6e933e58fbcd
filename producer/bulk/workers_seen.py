"""What workers say of themselves, as far as batches need it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import redis

from openlora.joblog.clients import redis_errors
from openlora.protocol.codec import decode_heartbeat
from openlora.protocol.names import BATCH_TOPIC, WORKERS_KEY, worker_key
from openlora.protocol.status import Heartbeat


def heartbeats(client: redis.Redis) -> list[Heartbeat]:
    """Of all living workers. Raises Overloaded."""
    reader: Any = client
    with redis_errors(client):
        ids = sorted(member.decode() for member in reader.smembers(WORKERS_KEY))
        values = reader.mget([worker_key(worker_id) for worker_id in ids]) if ids else []
    return [decode_heartbeat(value) for value in values if value is not None]


def nothing_pending(workers: Iterable[Heartbeat]) -> bool:
    """Whether workers live and none has, or could fetch, any batch line.

    A worker that has not fetched from a partition yet may find lines there.
    """
    ready = [worker for worker in workers if worker.ready]
    statuses = [s for worker in ready for s in worker.partitions if s.topic == BATCH_TOPIC]
    return bool(statuses) and all(0 <= s.high_water <= s.committed for s in statuses)
