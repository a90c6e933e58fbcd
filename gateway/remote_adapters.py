"""Adapters that a request names by URL: registered for its tenant when they are first used."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Sequence

from gateway.directory import AdapterDirectory
from gateway.registration import NewAdapter, Registrar, check_prefixes
from openlora.errors import Forbidden, OpenLoRAError, Overloaded, UnknownAdapter
from openlora.protocol.status import AdapterRecord
from openlora.registry.records import check_remote

MAX_FIRST_USES = 32
"""Adapters of this gateway that are on their way at once."""
FAILED_S = 15.0
"""What could not be had is not asked for again so soon."""
_KEPT_FAILURES = 1000
_SLUG_CHARS = 80


class RemoteAdapters:
    """First uses of URLs. One event loop's.

    Args:
        directory: of what is registered.
        registrar: checks, stores and registers.
        allowed: URL prefixes that requests may name; none: the setting is off.
    """

    def __init__(
        self, directory: AdapterDirectory, registrar: Registrar, allowed: Sequence[str]
    ) -> None:
        self._directory = directory
        self._registrar = registrar
        self._allowed = tuple(allowed)
        self._under_way: dict[tuple[str, str], asyncio.Task[AdapterRecord]] = {}
        self._failed: OrderedDict[tuple[str, str], tuple[float, OpenLoRAError]] = OrderedDict()

    async def get(self, url: str, tenant: str) -> AdapterRecord:
        """The record of the adapter at ``url``; its first use waits until it is stored.

        Later uses get what was stored then, also where the URL has other content by now: give a
        revision, or add it under an ID of its own to have versions.

        Raises:
            Forbidden: requests may not name this URL.
            AdapterFailed: nothing usable is there.
            Overloaded: too many are on their way already, or Redis does not answer.
        """
        check_remote(url)
        self._check_allowed(url)
        adapter_id = remote_id(url)
        try:
            return await self._directory.get(adapter_id, tenant)
        except UnknownAdapter:
            pass
        key = (tenant, url)
        self._raise_if_failed(key)
        task = self._under_way.get(key)
        if task is None:
            if len(self._under_way) >= MAX_FIRST_USES:
                raise Overloaded(
                    f"{MAX_FIRST_USES} adapters named by URL are on their way; try again",
                    retry_after_ms=1000,
                )
            new = NewAdapter(adapter_id, url, visibility="private")
            task = asyncio.create_task(
                self._registrar.register(new, tenant, also_from=self._allowed)
            )
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        # Shielded: one client that leaves takes nothing from the others that wait for it.
        return await asyncio.shield(task)

    def _check_allowed(self, url: str) -> None:
        if not self._allowed:
            raise Forbidden(
                f"adapter {url[:200]!r} is a URL, and requests may name none here "
                "(OPENLORA_REMOTE_ADAPTERS is not set); add it under an ID first: "
                "openlora adapters add ID URL"
            )
        check_prefixes(url, self._allowed, "OPENLORA_REMOTE_ADAPTERS")

    def _raise_if_failed(self, key: tuple[str, str]) -> None:
        until, error = self._failed.get(key, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error
        self._failed.pop(key, None)

    def _ended(self, key: tuple[str, str], task: asyncio.Task[AdapterRecord]) -> None:
        del self._under_way[key]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, OpenLoRAError) and not isinstance(error, Overloaded):
            self._failed[key] = time.monotonic() + FAILED_S, error
            if len(self._failed) > _KEPT_FAILURES:
                self._failed.popitem(last=False)


def remote_id(url: str) -> str:
    """The ID under which an adapter named by URL is registered: readable, and no other URL's."""
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", url.partition("://")[2])[-_SLUG_CHARS:].strip("-.")
    return f"{slug}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
