"""Which adapter store a setting names: a directory, or a URL below which adapters are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from openlora.adapters.peft_format import AdapterInfo, AdapterLayout
from openlora.adapters.store import AdapterStore

StoreLocation = Path | str
"""A directory, or a URL (which no ``Path`` can hold)."""


class Store(Protocol):
    """What ``AdapterStore`` and ``RemoteStore`` do alike; see there."""

    @property
    def name(self) -> str:
        """For messages: without passwords."""

    @property
    def scratch(self) -> Path:
        """A local directory for what is on its way to the store."""

    def put(
        self,
        directory: Path,
        *,
        holder: str | None = None,
        check: Callable[[AdapterLayout], None] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> AdapterInfo:
        """Check a directory and store its content."""

    def path(self, content_hash: str) -> Path:
        """The local directory of an adapter, once it is loaded."""

    def release(self, content_hash: str, holder: str, is_wanted: Callable[[], bool] = ...) -> bool:
        """``holder`` names the adapter no more; whether it was deleted."""

    def sweep(self) -> int:
        """Delete what processes that died left behind; how many."""


def is_url(location: StoreLocation) -> bool:
    """Whether the store is reached through a URL."""
    return "://" in str(location) if isinstance(location, str) else False


def store_location(value: str) -> StoreLocation:
    """A setting's value as a location."""
    return value if "://" in value else Path(value).expanduser()


def store_setting(flag: str | None, environ: Mapping[str, str]) -> StoreLocation:
    """The store that the settings name; without any, a directory in the user's cache.

    ``OPENLORA_ADAPTERS`` names it only as a URL: as a directory it is what ``openlora up`` watches.
    """
    adapters = environ.get("OPENLORA_ADAPTERS", "")
    named = flag or environ.get("OPENLORA_STORE") or (adapters if "://" in adapters else "")
    return store_location(named) if named else _user_cache(environ) / "adapters"


def adapter_cache(environ: Mapping[str, str]) -> Path:
    """Where copies of remote stores' adapters are kept on this machine."""
    named = environ.get("OPENLORA_ADAPTER_CACHE")
    return Path(named).expanduser() if named else _user_cache(environ) / "adapter-cache"


def _user_cache(environ: Mapping[str, str]) -> Path:
    root = environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "openlora"


def cache_of(location: StoreLocation, caches: Path) -> Path:
    """The directory below ``caches`` that has copies of a remote store's adapters."""
    return caches / hashlib.sha256(str(location).encode()).hexdigest()[:16]


def open_store(location: StoreLocation, caches: Path) -> Store:
    """The store of a location.

    Args:
        caches: where remote stores have their caches on this machine.

    Raises:
        SetupError: the URL's package is not installed.
    """
    if not is_url(location):
        return AdapterStore(Path(location))
    from openlora.adapters.remote_store import RemoteStore

    return RemoteStore(str(location), cache_of(location, caches))
