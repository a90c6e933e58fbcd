"""The adapters that a tenant's lines may name, read once in a while: there may be ten thousand."""

from __future__ import annotations

import time
from collections.abc import Callable

import redis

from openlora.joblog.clients import redis_errors
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry

FRESH_S = 5.0
"""A new version of an adapter is used by lines read this much later."""


class KnownAdapters:
    """A copy of the registry for each tenant whose lines are read. Safe for several threads: two
    that read it at once read the same."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._registry = AdapterRegistry(client)
        self._records: dict[str, tuple[float, dict[str, AdapterRecord]]] = {}

    def finder(self, tenant: str) -> Callable[[str], AdapterRecord | None]:
        """Finds what ``tenant`` may use by "id" or "id@version". What is not known here is asked
        for by itself, once: it may have been registered just now.

        Raises (also what it returns):
            Overloaded: Redis does not answer.
        """
        known = self._known(tenant)
        asked: dict[str, AdapterRecord | None] = {}

        def find(reference: str) -> AdapterRecord | None:
            if reference in known:
                return known[reference]
            if reference not in asked:
                with redis_errors(self._client):
                    asked[reference] = self._registry.get(reference, tenant)
            return asked[reference]

        return find

    def _known(self, tenant: str) -> dict[str, AdapterRecord]:
        read_at, records = self._records.get(tenant, (0.0, {}))
        now = time.monotonic()
        if now - read_at > FRESH_S or not read_at:
            with redis_errors(self._client):
                records = {record.id: record for record in self._registry.list(tenant)}
            # Only tenants whose lines are being read are kept.
            recent = {t: entry for t, entry in self._records.items() if now - entry[0] < FRESH_S}
            self._records = recent | {tenant: (now, records)}
        return records
