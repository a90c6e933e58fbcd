"""An entry of ``openlora.dead``: a message that could not be parsed or run, and why."""

from __future__ import annotations

import msgspec

from openlora.protocol.codec import checked_decoder
from openlora.protocol.crashes import Crash


class DeadLetter(msgspec.Struct, frozen=True):
    """One entry of ``openlora.dead``.

    ``value``: the message's bytes in base64, of ``value_bytes`` maybe the first ones only. What
    could not be parsed is there as it was, what could not be run as the job that was read from it.
    ``story``: the crashes of engines that the job was in, oldest first.
    """

    topic: str
    partition: int
    offset: int
    code: str
    reason: str
    value: str
    value_bytes: int
    worker_id: str
    written_ms: int
    job_id: str | None = None
    story: tuple[Crash, ...] = ()


decode_dead_letter = checked_decoder(DeadLetter, "dead letter")
