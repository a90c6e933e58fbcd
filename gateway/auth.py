"""Who is calling: API keys, and the Origin check against other sites' pages. Pure."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import unquote, urlsplit

from openlora.errors import Forbidden, SetupError, Unauthorized

DEFAULT_TENANT = "default"
SUBPROTOCOL = "openlora.v1"
KEY_SUBPROTOCOL_PREFIX = "openlora.key."
_KEY = re.compile(r"[!-$&-~]+")
_TENANT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class KeyPolicy:
    """What the holder of one key may do.

    Attributes:
        key_id: names the key in Redis and in messages; says nothing about it.
        adapters: patterns (``pirate``, ``acme-*``) of adapters it may use; None: all it may see.
        per_minute: requests that it may send a minute; None: any number.
    """

    key_id: str = ""
    adapters: tuple[str, ...] | None = None
    per_minute: float | None = None

    def check_adapter(self, adapter_id: str) -> None:
        """Raises Forbidden where the key may not use the adapter."""
        if self.adapters is None:
            return
        if not any(fnmatch.fnmatchcase(adapter_id, pattern) for pattern in self.adapters):
            raise Forbidden(
                f"this key may not use adapter {adapter_id!r}; ask the operator, or use one of "
                f"{', '.join(self.adapters) or 'none'}"
            )


ANYTHING = KeyPolicy()


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The accepted keys: (SHA-256 of the key, tenant, policy). Empty: no key is asked for."""

    entries: tuple[tuple[bytes, str, KeyPolicy], ...] = ()

    @classmethod
    def parse(cls, text: str) -> ApiKeys:
        """Keys of ``OPENLORA_API_KEYS``: ``key`` or ``tenant:key``, separated by commas.

        Raises:
            SetupError: an entry is unusable, which is named by its place and never by the key; or
                there is none behind what was written: that must not open the gateway to everybody.
        """
        items = [item for item in map(str.strip, text.split(",")) if item]
        if text and not items:
            raise SetupError(
                "OPENLORA_API_KEYS names no key; write key or tenant:key, or leave it unset to let "
                "everybody in"
            )
        entries = []
        for number, item in enumerate(items, start=1):
            tenant, colon, key = item.rpartition(":")
            tenant = tenant if colon else DEFAULT_TENANT
            if not _KEY.fullmatch(key) or not _TENANT.fullmatch(tenant):
                raise SetupError(
                    f"entry {number} of OPENLORA_API_KEYS is not valid; write key or tenant:key, "
                    "the key in visible ASCII characters but '%', the tenant in letters, digits, "
                    "'-', '_', '.'"
                )
            entries.append((_digest(key), tenant, ANYTHING))
        return cls(tuple(entries))

    def with_entries(self, entries: Iterable[tuple[bytes, str, KeyPolicy]]) -> ApiKeys:
        """These keys, and those of ``entries``."""
        added = tuple(entries)
        for _, tenant, _ in added:
            if not _TENANT.fullmatch(tenant):
                raise SetupError(f"tenant {tenant[:64]!r}: use letters, digits, '-', '_', '.'")
        return ApiKeys(self.entries + added)

    @property
    def required(self) -> bool:
        """Whether callers must show a key."""
        return bool(self.entries)

    def tenant_of(self, key: str | None) -> str:
        """The tenant that ``key`` belongs to. Raises Unauthorized, as ``caller_of``."""
        return self.caller_of(key)[0]

    def caller_of(self, key: str | None) -> tuple[str, KeyPolicy]:
        """The tenant that ``key`` belongs to, and what it may do.

        Raises:
            Unauthorized: a key is required and this one is missing or unknown.
        """
        if not self.entries:
            return DEFAULT_TENANT, ANYTHING
        if key is None:
            raise Unauthorized(
                "no API key; send `Authorization: Bearer KEY`, or from a browser's websocket the "
                f"subprotocol {KEY_SUBPROTOCOL_PREFIX}KEY beside {SUBPROTOCOL}"
            )
        digest = _digest(key)
        found = None
        # every entry is compared, so that the time taken tells nothing about which one matches
        for entry, tenant, policy in self.entries:
            if hmac.compare_digest(entry, digest):
                found = (tenant, policy)
        if found is None:
            raise Unauthorized("the API key is not known here; check it, or ask the operator")
        return found


def key_of(authorization: str | None, subprotocols: Sequence[str] = ()) -> str | None:
    """The key that a request carries in its header, or else in a websocket subprotocol."""
    if authorization:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return key.strip()
    for name in subprotocols:
        if name.startswith(KEY_SUBPROTOCOL_PREFIX):
            # percent-encoded by browsers: a subprotocol holds few characters
            return unquote(name[len(KEY_SUBPROTOCOL_PREFIX) :])
    return None


def check_origin(origin: str | None, host: str | None, allowed: Sequence[str] = ()) -> None:
    """Lets a browser act only from pages of this host, or of ``allowed`` origins (in lower case);
    programs send no Origin.

    Without it any page a user opens could talk to a gateway on the user's own machine.

    Raises:
        Forbidden: the page comes from elsewhere.
    """
    if origin is None or origin.lower() in allowed:
        return
    if _host_of(origin) != (host or "").lower():
        raise Forbidden(
            f"origin {origin[:200]!r} is not this server ({host}); open the page from here, or "
            "have the operator add its origin to OPENLORA_ORIGINS"
        )


def check_host(host: str | None, allowed: Sequence[str] = ()) -> None:
    """Lets requests in that name this machine, or the host of one of the ``allowed`` origins: for a
    gateway without keys that only programs of its own machine reach.

    A page can have its own name lead to 127.0.0.1 once it is loaded (DNS rebinding). To a browser
    the gateway then is where the page came from, and no Origin tells them apart.

    Raises:
        Forbidden: another name.
    """
    if host is None:  # a program: browsers always name it
        return
    name = _name_of(host) or ""
    if _is_address(name) or name == "localhost" or name.endswith(".localhost"):
        return
    if name == socket.gethostname().lower() or name in map(_name_of, map(_host_of, allowed)):
        return
    raise Forbidden(
        f"host {host[:200]!r} is not this machine; open http://localhost, or have the operator add "
        "its origin to OPENLORA_ORIGINS, or ask for keys"
    )


def is_loopback(address: str) -> bool:
    """Whether only programs of this machine reach what listens on ``address``."""
    return address == "localhost" or (_is_address(address) and ip_address(address).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _name_of(host: str | None) -> str | None:
    """``host`` in lower case without its port; None where it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _host_of(origin: str) -> str | None:
    """Host and port that ``origin`` names; None where it is no URL."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
