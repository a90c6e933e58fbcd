"""What may be registered, how it is named and who sees it. Pure: the Redis shells are beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from openlora.errors import Forbidden, InvalidRequest, UnknownAdapter
from openlora.protocol.codec import decode_adapter_record, encode
from openlora.protocol.names import (
    ADAPTERS_CHANNEL,
    ADAPTERS_CONTENTS_KEY,
    ADAPTERS_DROPPED_KEY,
    ADAPTERS_KEY,
    ADAPTERS_PINS_KEY,
    ADAPTERS_REVISION_KEY,
    adapter_versions_key,
)
from openlora.protocol.status import AdapterRecord

MAX_ADAPTER_ID_CHARS = 128
MAX_URL_CHARS = 2000
OPERATOR = "default"
"""Tenant of keys without a name, of systems without keys, and of records without an owner."""
KEPT_VERSIONS = 10
"""Versions of one ID that can be pinned or rolled back to; older ones are dropped."""

_ADAPTER_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[1-9]\d{0,8}")
VERSION_SUFFIX = b"#version"


@dataclass(frozen=True, slots=True)
class Reference:
    """An adapter as a request names it: ``id``, or ``id@version``."""

    id: str
    version: int | None = None

    def __str__(self) -> str:
        return self.id if self.version is None else f"{self.id}@{self.version}"


def check_adapter_id(adapter_id: str) -> str:
    """``adapter_id`` itself where it is well formed.

    Letters, digits, ``-``, ``_`` and ``.``, not starting with a dot: an ID is part of URLs, Kafka
    keys and file names, and must not be able to mean a path.

    Raises:
        InvalidRequest: naming the ID and the rule.
    """
    if len(adapter_id) > MAX_ADAPTER_ID_CHARS or not _ADAPTER_ID.fullmatch(adapter_id):
        shown = adapter_id if len(adapter_id) <= MAX_ADAPTER_ID_CHARS else adapter_id[:32] + "…"
        raise InvalidRequest(
            f"adapter ID {shown!r} is not valid; use 1 to {MAX_ADAPTER_ID_CHARS} letters, digits, "
            "'-', '_' or '.', not starting with '.'"
        )
    return adapter_id


def parse_reference(text: str) -> Reference:
    """``id`` or ``id@version``.

    Raises:
        InvalidRequest: the ID is malformed, or what follows the @ is no version.
    """
    adapter_id, at, version = text.partition("@")
    if not at:
        return Reference(check_adapter_id(text))
    if not _VERSION.fullmatch(version):
        raise InvalidRequest(
            f"adapter {text[:160]!r} pins no version; write id@version, a number from 1"
        )
    return Reference(check_adapter_id(adapter_id), int(version))


def is_remote(text: str) -> bool:
    """Whether a request names an adapter by URL instead of by ID."""
    return "://" in text


def check_remote(url: str) -> str:
    """``url`` itself where it may be one.

    Raises:
        InvalidRequest: it is too long, or holds what no URL does.
    """
    if len(url) > MAX_URL_CHARS or not url.isprintable() or " " in url:
        raise InvalidRequest(f"{url[:200]!r} is no URL of at most {MAX_URL_CHARS} characters")
    return url


def check_reference(text: str) -> str:
    """What a request may name an adapter by: ``id``, ``id@version`` or a URL; ``text`` itself.

    Raises:
        InvalidRequest: it is none of them.
    """
    return check_remote(text) if is_remote(text) else str(parse_reference(text))


def key_of(record: AdapterRecord) -> str:
    """The name under which the registry keeps ``record``."""
    return private_key(record.owner, record.id) if record.visibility == "private" else record.id


def private_key(tenant: str, adapter_id: str) -> str:
    """The key of a tenant's private adapter. No ID holds a slash, so no two keys meet."""
    return f"{tenant}/{adapter_id}"


def owner_of(record: AdapterRecord) -> str:
    """The tenant that may change the record."""
    return record.owner or OPERATOR


def visible_to(record: AdapterRecord, tenant: str) -> bool:
    """Whether ``tenant`` may know of the record."""
    return record.visibility == "public" or owner_of(record) == tenant


def visible_records(records: Iterable[AdapterRecord], tenant: str) -> list[AdapterRecord]:
    """What ``tenant`` may use, by ID; its own private adapter stands before a public one."""
    found: dict[str, AdapterRecord] = {}
    for record in records:
        is_own = record.visibility == "private"
        if visible_to(record, tenant) and (is_own or record.id not in found):
            found[record.id] = record
    return [found[adapter_id] for adapter_id in sorted(found)]


def records_of(fields: dict[bytes, bytes]) -> dict[str, AdapterRecord]:
    """All records of the index, by key."""
    return {
        name.decode(): decode_adapter_record(value)
        for name, value in fields.items()
        if not name.endswith(VERSION_SUFFIX)
    }


@dataclass(frozen=True, slots=True)
class Call:
    """Keys and arguments of one script."""

    keys: list[str]
    args: list[str | bytes | int]


def put_call(record: AdapterRecord, now_ms: int) -> Call:
    """Arguments of ``PUT``. Raises InvalidRequest: the ID or the visibility is none."""
    check_adapter_id(record.id)
    if record.visibility not in ("public", "private"):
        raise InvalidRequest(
            f"visibility is {record.visibility[:64]!r}; it must be 'public' or 'private'"
        )
    record = msgspec.structs.replace(record, version=0, owner=owner_of(record))
    key = key_of(record)
    return Call(
        _keys(key),
        [ADAPTERS_CHANNEL, key, encode(record), record.hash, record.owner, now_ms, KEPT_VERSIONS],
    )


def change_call(key: str, owner: str, now_ms: int, version: int | None) -> Call:
    """Arguments of ``REMOVE`` and ``ROLLBACK``."""
    wanted = "" if version is None else version
    return Call(_keys(key), [ADAPTERS_CHANNEL, key, owner, now_ms, wanted])


def pin_call(key: str, *, pinned: bool) -> Call:
    """Arguments of ``PIN``."""
    return Call(_keys(key), [ADAPTERS_CHANNEL, key, "1" if pinned else "0"])


def result_of(reply: Any, reference: Reference) -> AdapterRecord | None:
    """The record that a script answered with; None for a removal.

    Raises:
        UnknownAdapter, InvalidRequest, Forbidden: what the script refused.
    """
    status = reply[0]
    if status == b"forbidden":
        raise Forbidden(
            f"adapter {str(reference)!r} belongs to another tenant; register yours under another "
            "ID, or with visibility 'private'"
        )
    if status == b"missing":
        raise unknown(reference)
    if status == b"current":
        raise InvalidRequest(
            f"{str(reference)!r} is the version in use; roll back or add another one first, or "
            f"remove {reference.id!r} with all its versions"
        )
    return None if status == b"removed" else decode_adapter_record(reply[1])


def unknown(reference: Reference) -> UnknownAdapter:
    """Nobody registered it, or not for this tenant: both read the same."""
    kept = "" if reference.version is None else f" or its version {reference.version} is gone"
    return UnknownAdapter(
        f"adapter {str(reference)!r} is not registered{kept}; GET /v1/adapters lists those that are"
    )


def _keys(key: str) -> list[str]:
    return [
        ADAPTERS_KEY,
        adapter_versions_key(key),
        ADAPTERS_CONTENTS_KEY,
        ADAPTERS_DROPPED_KEY,
        ADAPTERS_REVISION_KEY,
        ADAPTERS_PINS_KEY,
    ]
