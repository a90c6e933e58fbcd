"""What is remembered of an engine that crashed."""

from __future__ import annotations

import msgspec

from openlora.protocol.codec import checked_decoder


class Crash(msgspec.Struct, frozen=True):
    """One engine's crash. ``how``: "SIGSEGV" or "status 1"; ``jobs``: how many were inside."""

    at_ms: int
    worker_id: str
    how: str
    jobs: int


decode_crash = checked_decoder(Crash, "crash record")
