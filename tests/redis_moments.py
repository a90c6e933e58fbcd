"""Moments that a Redis of a test's own falls back to when it has crashed."""

from __future__ import annotations

import redis

from openlora.bench.chaos_redis import RedisMoment
from openlora.local import ServerProcess

KEEP_TIMEOUT_MS = 5000


def keep(server: ServerProcess) -> RedisMoment:
    """Wait until the server's disk holds all that it acknowledged: it loses nothing of that."""
    with redis.Redis.from_url(server.address) as client:
        kept, _ = client.execute_command("WAITAOF", 1, 0, KEEP_TIMEOUT_MS)
    assert kept == 1, "Redis did not write its journal in time"
    return RedisMoment.of(server)
