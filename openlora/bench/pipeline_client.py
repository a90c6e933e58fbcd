"""The benchmark's client process: many websocket streams, as little work per token as Python can.

    python -m openlora.bench.pipeline_client '{"url": …}'   →   one JSON line

It splits frames itself: a library's general frame parser costs several times what is to be
measured. The same client serves the product and the bare relay.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Any

import msgspec
import uvloop
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from workers.scripted_engine import clock_age_ms

OPCODE_MASK = 0x0F


class ClientPlan(msgspec.Struct, frozen=True):
    """What the client does.

    Attributes:
        url: websocket URL.
        relay: speak the bare relay's protocol instead of openlora.v1.
        streams: connections, one request at a time on each.
        requests: requests of each stream, one after the other.
        tokens: tokens of each request.
        stagger: each stream's first request has a length of its own, so that those after it start
            evenly spread in time. The first ones, which start all at once, are not measured.
    """

    url: str
    relay: bool
    streams: int
    requests: int
    tokens: int
    stagger: bool = False


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
    """What the client saw. ``latency``: emit → receive. Nothing is counted in it of the relay."""

    tokens: int
    seconds: float
    cpu_seconds: float
    latency: Spread
    added_ttft: Spread
    errors: list[str]


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of ``values`` do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class _Timings(msgspec.Struct):
    queue_ms: float = 0.0
    ttft_ms: float = 0.0


class _Message(msgspec.Struct):
    type: str
    token_id: int = -1
    index: int = -1
    message: str = ""
    timings: _Timings | None = None


_decode = msgspec.json.Decoder(_Message).decode


class Totals:
    """What all streams of the process have in common."""

    def __init__(self, plan: ClientPlan) -> None:
        self.plan = plan
        self.tokens = 0
        self.latencies_ms: list[float] = []
        self.added_ttft_ms: list[float] = []
        self.errors: list[str] = []
        self.connected = 0
        self.open_streams = plan.streams
        self.all_connected = asyncio.get_running_loop().create_future()
        self.all_done = asyncio.get_running_loop().create_future()
        self.started_ns = 0
        self.ended_ns = 0

    def stream_connected(self) -> None:
        self.connected += 1
        if self.connected == self.plan.streams:
            self.all_connected.set_result(None)

    def stream_failed(self, reason: str) -> None:
        self.errors.append(reason)
        if not self.all_connected.done():
            self.all_connected.set_exception(ConnectionError(reason))
        self.stream_done()

    def stream_done(self) -> None:
        self.open_streams -= 1
        if self.open_streams == 0 and not self.all_done.done():
            self.ended_ns = time.monotonic_ns()
            self.all_done.set_result(None)


class StreamProtocol(asyncio.Protocol):
    """One connection: handshake by ``websockets``, frames by hand."""

    def __init__(self, number: int, totals: Totals) -> None:
        self._number = number
        self._totals = totals
        self._plan = totals.plan
        self._handshake: ClientProtocol | None = None
        self._buffer = b""
        self._transport: Any = None
        self._requests_left = totals.plan.requests
        self._sent_ns = 0
        self._first_token_ns = 0
        self._is_done = False
        self._is_measured = not totals.plan.stagger

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        subprotocols = None if self._plan.relay else [Subprotocol("openlora.v1")]
        protocol = ClientProtocol(parse_uri(self._plan.url), subprotocols=subprotocols)
        protocol.send_request(protocol.connect())
        self._handshake = protocol
        self._transport.write(b"".join(protocol.data_to_send()))

    def data_received(self, data: bytes) -> None:
        if self._handshake is not None:
            self._handshake.receive_data(data)
            if self._handshake.events_received():
                error, self._handshake = self._handshake.handshake_exc, None
                if error is None:
                    self._totals.stream_connected()
                else:
                    self._fail(f"handshake: {error!r}")
            return
        now = time.monotonic_ns()
        buffer = self._buffer + data if self._buffer else data
        start, size = 0, len(buffer)
        while size - start >= 2:
            length, body = buffer[start + 1], start + 2
            if length == 126:
                length, body = int.from_bytes(buffer[start + 2 : start + 4], "big"), start + 4
            elif length == 127:
                length, body = int.from_bytes(buffer[start + 2 : start + 10], "big"), start + 10
            end = body + length
            if end > size:
                break
            opcode = buffer[start] & OPCODE_MASK
            if opcode == Opcode.TEXT:
                self._on_message(buffer[body:end], now)
            elif opcode == Opcode.PING:
                self._send(Opcode.PONG, buffer[body:end])
            elif opcode == Opcode.CLOSE:
                self._fail("closed by the server")
            start = end
        self._buffer = buffer[start:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"connection lost: {exc!r}")

    def _fail(self, reason: str) -> None:
        if not self._is_done:
            self._is_done = True
            self._totals.stream_failed(reason)

    def _send(self, opcode: Opcode, data: bytes) -> None:
        self._transport.write(Frame(opcode, data).serialize(mask=True))

    def begin(self) -> None:
        """Send the next request."""
        plan = self._plan
        if plan.relay:
            self._send(Opcode.TEXT, str(self._number).encode())
            return
        tokens = plan.tokens
        if plan.stagger and self._requests_left == plan.requests:
            tokens = random.Random(self._number).randint(1, tokens)
        request = {
            "type": "generate",
            "request_id": "r",
            "prompt": "benchmark",
            "params": {"max_tokens": tokens, "temperature": 0, "seed": self._number},
        }
        self._first_token_ns = 0
        self._sent_ns = time.monotonic_ns()
        self._send(Opcode.TEXT, msgspec.json.encode(request))

    def _on_message(self, data: bytes, now: int) -> None:
        message = _decode(data)
        if message.type == "token":
            self._totals.tokens += 1
            if not self._plan.relay:
                if self._is_measured:
                    self._totals.latencies_ms.append(clock_age_ms(message.token_id, now))
                if not self._first_token_ns:
                    self._first_token_ns = now
            elif message.index == self._plan.tokens - 1:
                self._finish()
        elif message.type == "done":
            if message.timings is not None and self._is_measured:
                waited_ms = (self._first_token_ns - self._sent_ns) / 1e6
                engine_ms = message.timings.ttft_ms - message.timings.queue_ms
                self._totals.added_ttft_ms.append(waited_ms - engine_ms)
            self._requests_left -= 1
            if self._requests_left:
                self._is_measured = True
                self.begin()
            else:
                self._finish()
        elif message.type == "error":
            self._fail(message.message)

    def _finish(self) -> None:
        if not self._is_done:
            self._is_done = True
            self._totals.stream_done()


async def run_plan(plan: ClientPlan) -> ClientResult:
    """Connect all streams, run their requests, report."""
    loop = asyncio.get_running_loop()
    totals = Totals(plan)
    uri = parse_uri(plan.url)
    streams = []
    for number in range(plan.streams):
        _, protocol = await loop.create_connection(
            lambda number=number: StreamProtocol(number, totals),  # type: ignore[misc]
            uri.host,
            uri.port,
        )
        streams.append(protocol)
    await totals.all_connected
    cpu_before = time.process_time()
    totals.started_ns = time.monotonic_ns()
    for protocol in streams:
        protocol.begin()
    await totals.all_done
    return ClientResult(
        tokens=totals.tokens,
        seconds=(totals.ended_ns - totals.started_ns) / 1e9,
        cpu_seconds=time.process_time() - cpu_before,
        latency=Spread.of(totals.latencies_ms),
        added_ttft=Spread.of(totals.added_ttft_ms),
        errors=totals.errors,
    )


def main() -> int:
    """Run the plan given as the only argument; print the result as JSON."""
    plan = msgspec.json.decode(sys.argv[1], type=ClientPlan)
    result = uvloop.run(run_plan(plan))
    sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
