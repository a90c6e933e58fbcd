"""What the pipeline benchmark's client is told, and what it answers."""

from __future__ import annotations

import msgspec

WINDOW_OPEN = b"window open\n"
"""The client's first line: from here on it measures."""


class StreamRequest(msgspec.Struct, frozen=True):
    """What a stream asks for. ``adapter`` None: the base model."""

    prompt: str
    adapter: str | None = None


class ClientPlan(msgspec.Struct, frozen=True):
    """What the client does.

    Attributes:
        url: websocket URL.
        relay: speak the bare relay's protocol instead of openlora.v1.
        streams: connections, one request at a time on each.
        tokens: tokens of each request.
        window_s: 0: one request on each stream, all sent at once; measured from the first request
            to the last token. Else a steady state: each stream asks again whenever its request has
            ended. The first requests come one after the other within the first half of ``ramp_s``
            and have lengths of their own, so that ends and starts are spread evenly from then on;
            what is received in ``window_s`` after the ramp is measured.
        ramp_s: see ``window_s``.
        limit_s: the client gives up after so long.
        requests: of the streams in turn.
    """

    url: str
    relay: bool
    streams: int
    tokens: int
    window_s: float = 0.0
    ramp_s: float = 0.0
    limit_s: float = 60.0
    requests: tuple[StreamRequest, ...] = (StreamRequest("benchmark"),)


class Spread(msgspec.Struct, frozen=True):
    """Percentiles of ``count`` samples, in ms; all 0 of none."""

    count: int
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, samples_ms: list[float]) -> Spread:
        """The spread of ``samples_ms``."""
        return cls(len(samples_ms), percentile(samples_ms, 0.5), percentile(samples_ms, 0.99))


class ClientResult(msgspec.Struct, frozen=True):
    """What the client saw while it measured. ``latency``: emit → receive, where the tokens say the
    time of their step. ``requests`` is the number of those that began and ended meanwhile."""

    tokens: int
    seconds: float
    cpu_seconds: float
    requests: int
    latency: Spread
    added_ttft: Spread
    errors: list[str]


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of ``values`` do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
