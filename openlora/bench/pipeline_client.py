"""The benchmark's client process: many websocket streams, as little work per token as Python can.

    python -m openlora.bench.pipeline_client '{"url": …}'   →   one JSON line

It splits frames itself: a library's general frame parser costs several times what is to be
measured. The same client serves the product and the bare relay, and checks that each token of each
request comes once and in order.
"""

from __future__ import annotations

import asyncio
import gc
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

from openlora.bench.pipeline_plan import WINDOW_OPEN, ClientPlan, ClientResult, Spread
from workers.scripted_engine import CLOCK_TICK_NS, CLOCK_TICKS

OPCODE_MASK = 0x0F
TICK_MS = CLOCK_TICK_NS / 1e6


class _Timings(msgspec.Struct):
    queue_ms: float = 0.0
    ttft_ms: float = 0.0


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Message(msgspec.Struct, gc=False):
    type: str
    token_id: int = -1
    index: int = -1
    message: str = ""
    usage: _Usage | None = None
    timings: _Timings | None = None


_decode = msgspec.json.Decoder(_Message).decode


class Totals:
    """What all streams of the process have in common."""

    def __init__(self, plan: ClientPlan) -> None:
        loop = asyncio.get_running_loop()
        self.plan = plan
        self.tokens = 0
        self.ages: list[int] = []
        """Clock ticks from a token's step to its receipt."""
        self.added_ttft_ms: list[float] = []
        self.errors: list[str] = []
        self.connected = 0
        self.open_streams = plan.streams
        self.all_connected = loop.create_future()
        self.all_done = loop.create_future()
        self.window_started_ns = 0
        self._cpu_before_s = 0.0

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
            self.all_done.set_result(None)

    def open_window(self) -> None:
        """What came before is not counted. Says so on standard output."""
        self.tokens = 0
        self.ages.clear()
        self.added_ttft_ms.clear()
        self._cpu_before_s = time.process_time()
        sys.stdout.buffer.write(WINDOW_OPEN)
        sys.stdout.buffer.flush()
        self.window_started_ns = time.monotonic_ns()

    def result(self) -> ClientResult:
        """What came since ``open_window``."""
        seconds = (time.monotonic_ns() - self.window_started_ns) / 1e9
        return ClientResult(
            tokens=self.tokens,
            seconds=seconds,
            cpu_seconds=time.process_time() - self._cpu_before_s,
            requests=len(self.added_ttft_ms),
            latency=Spread.of([age * TICK_MS for age in self.ages]),
            added_ttft=Spread.of(self.added_ttft_ms),
            errors=[*self.errors],
        )


class StreamProtocol(asyncio.Protocol):
    """One connection: handshake by ``websockets``, frames by hand."""

    def __init__(self, number: int, totals: Totals) -> None:
        self._number = number
        self._totals = totals
        self._plan = totals.plan
        self._handshake: ClientProtocol | None = None
        self._buffer = b""
        self._transport: Any = None
        self._next_index = 0
        self._sent_ns = 0
        self._first_token_ns = 0
        self._is_done = False

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

    def begin(self, tokens: int) -> None:
        """Send a request for ``tokens`` tokens."""
        if self._plan.relay:
            self._send(Opcode.TEXT, str(self._number).encode())
            return
        asked = self._plan.requests[self._number % len(self._plan.requests)]
        request = {
            "type": "generate",
            "request_id": "r",
            "prompt": asked.prompt,
            "params": {
                "max_tokens": tokens,
                "temperature": 0,
                "seed": self._number,
                "ignore_eos": True,
            },
        }
        if asked.adapter is not None:
            request["adapter"] = asked.adapter
        self._next_index = self._first_token_ns = 0
        self._sent_ns = time.monotonic_ns()
        self._send(Opcode.TEXT, msgspec.json.encode(request))

    def _on_message(self, data: bytes, now: int) -> None:
        message = _decode(data)
        if message.type == "token":
            totals = self._totals
            totals.tokens += 1
            totals.ages.append((now // CLOCK_TICK_NS - message.token_id) % CLOCK_TICKS)
            if self._plan.relay:
                if message.index == self._plan.tokens - 1:
                    self._finish()
                return
            if message.index != self._next_index:
                self._fail(f"token {message.index} came in place of {self._next_index}")
            self._next_index += 1
            if not self._first_token_ns:
                self._first_token_ns = now
        elif message.type == "done":
            self._on_done(message)
        elif message.type == "error":
            self._fail(message.message)

    def _on_done(self, message: _Message) -> None:
        usage, timings = message.usage, message.timings
        if usage is None or timings is None or usage.completion_tokens != self._next_index:
            self._fail(f"{self._next_index} tokens came of {usage}")
            return
        if self._sent_ns >= self._totals.window_started_ns:
            waited_ms = (self._first_token_ns - self._sent_ns) / 1e6
            engine_ms = timings.ttft_ms - timings.queue_ms
            self._totals.added_ttft_ms.append(waited_ms - engine_ms)
        if self._plan.window_s:
            self.begin(self._plan.tokens)
        else:
            self._finish()

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
    try:
        async with asyncio.timeout(plan.limit_s):
            await totals.all_connected
            if plan.window_s:
                return await _steady_state(streams, totals)
            totals.open_window()
            for protocol in streams:
                protocol.begin(plan.tokens)
            await totals.all_done
    except TimeoutError:
        totals.errors.append(
            f"{totals.open_streams} of {plan.streams} streams had not ended after "
            f"{plan.limit_s:g} s; {totals.tokens} tokens had come"
        )
    return totals.result()


async def _steady_state(streams: list[StreamProtocol], totals: Totals) -> ClientResult:
    plan = totals.plan
    lengths = random.Random(len(streams))
    for protocol in streams:
        protocol.begin(plan.tokens if plan.relay else lengths.randint(1, plan.tokens))
        await asyncio.sleep(plan.ramp_s / 2 / len(streams))
    await asyncio.sleep(plan.ramp_s / 2)
    totals.open_window()
    # all streams may fail before the window closes
    await asyncio.wait([totals.all_done], timeout=plan.window_s)
    return totals.result()


def main() -> int:
    """Run the plan given as the only argument; print a line when the measured time begins, and the
    result as JSON."""
    plan = msgspec.json.decode(sys.argv[1], type=ClientPlan)
    gc.disable()  # a pause of the client is no latency of what it measures
    result = uvloop.run(run_plan(plan))
    sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
