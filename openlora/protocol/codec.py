"""Bytes ↔ messages, with errors that say what was wrong. JSON: kcat and redis-cli show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from openlora.errors import InvalidRequest
from openlora.protocol.events import Chunk
from openlora.protocol.jobs import Job
from openlora.protocol.status import AdapterRecord, Heartbeat

T = TypeVar("T")

encode: Callable[[object], bytes] = msgspec.json.Encoder().encode
"""Any message of this package as compact JSON. Called for every chunk of live tokens."""


def checked_decoder(kind: type[T], name: str) -> Callable[[bytes | str], T]:
    """A decoder of JSON to ``kind``; what is none raises InvalidRequest naming ``name``."""
    decode = msgspec.json.Decoder(kind).decode

    def decode_checked(data: bytes | str) -> T:
        try:
            return decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"not a valid {name}: {error}") from error

    return decode_checked


decode_job = checked_decoder(Job, "job")
decode_chunk = checked_decoder(Chunk, "chunk")
decode_chunks = checked_decoder(tuple[Chunk, ...], "array of chunks")
decode_heartbeat = checked_decoder(Heartbeat, "heartbeat")
decode_adapter_record = checked_decoder(AdapterRecord, "adapter record")
