"""What may be registered and how versions count. Pure: the Redis shells are beside it.

One Redis hash holds everything, so that one WATCH covers a change and one slot holds it on a
cluster: field ``<id>`` is the newest record as JSON, field ``<id>#version`` the last version
given out. The second outlives a removal: an ID that comes back never repeats a version.
"""

from __future__ import annotations

import re

import msgspec

from openlora.errors import InvalidRequest
from openlora.protocol.codec import decode_adapter_record, encode
from openlora.protocol.status import AdapterRecord

MAX_ADAPTER_ID_CHARS = 128
_ADAPTER_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_VERSION_SUFFIX = "#version"


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


def version_field(adapter_id: str) -> str:
    """Field that keeps the last version given to ``adapter_id``."""
    return adapter_id + _VERSION_SUFFIX


def next_record(
    record: AdapterRecord, newest: bytes | None, last_version: bytes | None
) -> AdapterRecord | None:
    """``record`` with its version, or None where the newest version has the same content."""
    if newest is not None and decode_adapter_record(newest).hash == record.hash:
        return None
    return msgspec.structs.replace(record, version=int(last_version or 0) + 1)


def fields_of(record: AdapterRecord) -> dict[str, bytes | int]:
    """The hash fields that store ``record``."""
    return {record.id: encode(record), version_field(record.id): record.version}


def records_of(fields: dict[bytes, bytes]) -> list[AdapterRecord]:
    """All records of the hash, by ID."""
    suffix = _VERSION_SUFFIX.encode()
    records = [
        decode_adapter_record(value) for name, value in fields.items() if not name.endswith(suffix)
    ]
    return sorted(records, key=lambda record: record.id)
