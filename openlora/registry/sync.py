"""``AdapterRegistry``: the blocking shell, for workers, the producer and the command line."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import redis

from openlora.protocol.codec import decode_adapter_record
from openlora.protocol.names import (
    ADAPTERS_CONTENTS_KEY,
    ADAPTERS_DROPPED_KEY,
    ADAPTERS_HOLDER_KEY,
    ADAPTERS_KEY,
    ADAPTERS_PINS_KEY,
    ADAPTERS_REVISION_KEY,
    adapter_versions_key,
)
from openlora.protocol.status import AdapterRecord
from openlora.registry import scripts
from openlora.registry.records import (
    OPERATOR,
    Reference,
    change_call,
    parse_reference,
    pin_call,
    private_key,
    put_call,
    records_of,
    result_of,
    visible_records,
)


class AdapterRegistry:
    """Adapter records in Redis; every change is published on ``ADAPTERS_CHANNEL``.

    A tenant sees public adapters and its own private ones; where both have an ID, its own counts.
    The client must return bytes (``decode_responses=False``, redis-py's default).
    """

    def __init__(self, client: redis.Redis) -> None:
        # redis-py types each command as "the answer or an awaitable of it"
        self._redis: Any = client
        self._put = self._redis.register_script(scripts.PUT)
        self._remove = self._redis.register_script(scripts.REMOVE)
        self._rollback = self._redis.register_script(scripts.ROLLBACK)
        self._pin = self._redis.register_script(scripts.PIN)

    def get(self, reference: str, tenant: str = OPERATOR) -> AdapterRecord | None:
        """The version in use of an ID, or the one pinned by ``id@version``; None: not there.

        Raises:
            InvalidRequest: ``reference`` is malformed.
        """
        wanted = parse_reference(reference)
        private, public = self._redis.hmget(ADAPTERS_KEY, private_key(tenant, wanted.id), wanted.id)
        newest = private if private is not None else public
        if newest is None:
            return None
        record = decode_adapter_record(newest)
        if wanted.version in (None, record.version):
            return record
        key = wanted.id if private is None else private_key(tenant, wanted.id)
        pinned = self._redis.hget(adapter_versions_key(key), wanted.version)
        return None if pinned is None else decode_adapter_record(pinned)

    def list(self, tenant: str | None = None) -> list[AdapterRecord]:
        """The versions in use of what ``tenant`` may see, by ID; None: of all, by key."""
        records = records_of(self._redis.hgetall(ADAPTERS_KEY))
        if tenant is None:
            return [records[key] for key in sorted(records)]
        return visible_records(records.values(), tenant)

    def revision(self) -> int:
        """Number of changes so far."""
        return int(self._redis.get(ADAPTERS_REVISION_KEY) or 0)

    def versions(self, adapter_id: str, tenant: str = OPERATOR) -> Sequence[AdapterRecord]:
        """All kept versions of an ID, the oldest first."""
        found = self._redis.hgetall(adapter_versions_key(self._key(adapter_id, tenant)))
        records = [decode_adapter_record(value) for value in found.values()]
        return sorted(records, key=lambda record: record.version)

    def put(self, record: AdapterRecord) -> AdapterRecord:
        """Registers ``record`` and returns it with its version; ``record.version`` is ignored.

        Content that the version in use already has makes no new version: that one is returned.

        Raises:
            InvalidRequest: the ID or the visibility is malformed.
            Forbidden: the ID is another tenant's.
        """
        call = put_call(record, _now_ms())
        reply = self._put(keys=call.keys, args=call.args)
        stored = result_of(reply, Reference(record.id))
        assert stored is not None
        return stored

    def remove(self, reference: str, tenant: str = OPERATOR) -> bool:
        """Forgets an ID, or one version of it; False: not there. Running jobs keep it.

        Raises:
            InvalidRequest: the version is the one in use.
            Forbidden: it is another tenant's.
        """
        wanted = parse_reference(reference)
        call = change_call(self._key(wanted.id, tenant), tenant, _now_ms(), wanted.version)
        reply = self._remove(keys=call.keys, args=call.args)
        return reply[0] != b"missing" and result_of(reply, wanted) is None

    def rollback(
        self, adapter_id: str, tenant: str = OPERATOR, version: int | None = None
    ) -> AdapterRecord:
        """Requests get ``version`` from now on, or the one before that in use.

        Raises:
            UnknownAdapter: there is no such ID or version.
            Forbidden: it is another tenant's.
        """
        call = change_call(self._key(adapter_id, tenant), tenant, _now_ms(), version)
        reply = self._rollback(keys=call.keys, args=call.args)
        stored = result_of(reply, Reference(adapter_id, version))
        assert stored is not None
        return stored

    def pin(self, key: str, *, pinned: bool) -> AdapterRecord:
        """Have workers keep what ``key`` (of ``key_of``) names in pages, or no more.

        Raises:
            UnknownAdapter: it is not registered.
        """
        call = pin_call(key, pinned=pinned)
        reply = self._pin(keys=call.keys, args=call.args)
        stored = result_of(reply, Reference(key))
        assert stored is not None
        return stored

    def pins(self) -> dict[str, AdapterRecord]:
        """The versions in use of all that is pinned, by key."""
        keys = sorted(self._redis.smembers(ADAPTERS_PINS_KEY))
        found = self._redis.hmget(ADAPTERS_KEY, keys) if keys else []
        return {
            key.decode(): decode_adapter_record(value)
            for key, value in zip(keys, found, strict=True)
            if value is not None
        }

    def holder(self) -> str:
        """The name under which this registry holds content in stores."""
        self._redis.set(ADAPTERS_HOLDER_KEY, secrets.token_hex(16), nx=True)
        name: bytes = self._redis.get(ADAPTERS_HOLDER_KEY)
        return name.decode()

    def dropped(self, before_ms: int) -> Sequence[str]:
        """Hashes of content that no version has named since ``before_ms``."""
        found = self._redis.zrangebyscore(ADAPTERS_DROPPED_KEY, 0, before_ms)
        return [content.decode() for content in found]

    def is_named(self, content_hash: str) -> bool:
        """Whether a version names this content."""
        return bool(self._redis.hexists(ADAPTERS_CONTENTS_KEY, content_hash))

    def expect(self, content_hash: str, within_ms: int = 0) -> None:
        """Content is stored for a version that may never come: collect it then.

        Where the content was dropped long ago it counts as dropped now, or ``within_ms`` from now,
        for as long as storing takes: the version gets its time.
        """
        self._redis.zadd(ADAPTERS_DROPPED_KEY, {content_hash: _now_ms() + within_ms})

    def forget(self, content_hash: str) -> None:
        """Dropped content was released from the store."""
        self._redis.zrem(ADAPTERS_DROPPED_KEY, content_hash)

    def _key(self, adapter_id: str, tenant: str) -> str:
        private = private_key(tenant, adapter_id)
        return private if self._redis.hexists(ADAPTERS_KEY, private) else adapter_id


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
