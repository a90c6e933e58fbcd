"""What a fault did to the streams, counted from what their clients saw."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from openlora.bench.chaos_streams import Answer, Ask, Clients, Stream
from openlora.errors import InternalError

RECORD_TIMEOUT_S = 120.0


class FaultRow(msgspec.Struct, frozen=True):
    """One fault, or several of one kind added up.

    Attributes:
        hit: streams that were open when it struck.
        lost, repeated, changed: tokens (or ends) that a client should not have missed, met again,
            or met otherwise; failed: streams that ended in an error.
        restarted: streams that were told ``restarted`` and began again.
        refused: requests answered with a retriable error before they were accepted.
        worst_stall_s: longest pause between two tokens of a stream that was hit.
        worst_wait_s: longest time from ``accepted`` to the first token.
        mishaps: the first few, in words.
    """

    fault: str
    times: int
    hit: int
    lost: int
    repeated: int
    changed: int
    failed: int
    restarted: int
    refused: int
    worst_stall_s: float
    worst_wait_s: float
    mishaps: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether no client saw anything but its answer."""
        return not (self.lost or self.repeated or self.changed or self.failed)


def record_answers(clients: Clients, asks: Sequence[Ask], tokens: int) -> Mapping[str, Answer]:
    """The undisturbed run: what each of ``asks`` is answered, by its name.

    Raises:
        InternalError: a stream did not come to its ``tokens`` although nothing was broken.
    """
    streams = [clients.begin(ask, None) for ask in asks]
    clients.wait(streams, RECORD_TIMEOUT_S)
    for stream in streams:
        if stream.mishaps or len(stream.token_ids) != tokens:
            raise InternalError(
                f"{stream.ask.name} ended with {stream.finish} after {len(stream.token_ids)} "
                f"tokens in the undisturbed run: {stream.mishaps}"
            )
    return {s.ask.name: Answer(tuple(s.token_ids), s.text) for s in streams}


def fault_row(fault: str, streams: Iterable[Stream], at: float, until: float) -> FaultRow:
    """What ``fault``, which struck ``at``, did before ``until`` (monotonic seconds)."""
    everyone = list(streams)
    mishaps = [m for stream in everyone for m in stream.mishaps if at <= m.at < until]
    kinds = Counter(mishap.kind for mishap in mishaps)
    hit = [stream for stream in everyone if stream.was_open_at(at)]
    return FaultRow(
        fault=fault,
        times=1,
        hit=len(hit),
        lost=kinds["lost"],
        repeated=kinds["repeated"],
        changed=kinds["changed"],
        failed=kinds["failed"],
        restarted=sum(any(at <= r < until for r in stream.restarts) for stream in everyone),
        refused=sum(any(at <= r < until for r in stream.refused_at) for stream in everyone),
        worst_stall_s=_worst((s.times[1:] for s in hit), at, until),
        worst_wait_s=_worst((s.times[:2] for s in everyone), at, until),
        mishaps=tuple(f"{m.kind}: {m.detail}" for m in mishaps[:5]),
    )


def add_rows(rows: Sequence[FaultRow]) -> FaultRow:
    """Rows of one kind of fault as one."""
    first = rows[0]
    return FaultRow(
        fault=first.fault,
        times=len(rows),
        hit=sum(row.hit for row in rows),
        lost=sum(row.lost for row in rows),
        repeated=sum(row.repeated for row in rows),
        changed=sum(row.changed for row in rows),
        failed=sum(row.failed for row in rows),
        restarted=sum(row.restarted for row in rows),
        refused=sum(row.refused for row in rows),
        worst_stall_s=max(row.worst_stall_s for row in rows),
        worst_wait_s=max(row.worst_wait_s for row in rows),
        mishaps=tuple(text for row in rows for text in row.mishaps)[:5],
    )


def _worst(streams: Iterable[Sequence[float]], at: float, until: float) -> float:
    """The longest pause between neighbours of one stream that overlaps the time in question."""
    pauses = (
        b - a for times in streams for a, b in itertools.pairwise(times) if b > at and a < until
    )
    return round(max(pauses, default=0.0), 2)
