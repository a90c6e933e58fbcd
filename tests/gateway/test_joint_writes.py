"""Frames written past the transport: in order with those written through it, and nowhere else."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import pytest
import uvicorn
import uvloop
from websockets.asyncio.client import connect

from gateway import joint_writes
from gateway.joint_writes import Write, raw_descriptor, write_all
from gateway.ws_protocol import TEXT_FRAMES, WebSocketProtocol

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
Handle = Callable[[WebSocketProtocol, Callable[[], Awaitable[dict]]], Awaitable[None]]


@asynccontextmanager
async def serving(handle: Handle) -> AsyncIterator[str]:
    """A uvicorn server on the gateway's protocol; ``handle`` runs each accepted connection."""

    async def app(scope, receive, send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await handle(scope["extensions"][TEXT_FRAMES], receive)

    config = uvicorn.Config(
        app, ws=WebSocketProtocol, ws_per_message_deflate=False, lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        await task


def write(writer: WebSocketProtocol, frame: str) -> bool:
    """By ``write_all``; whether the frame was for the socket itself."""
    writes: list[Write] = []
    assert writer.gather_frames([frame], writes)
    write_all(writes)
    return bool(writes)


def run(main: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_client_gets_all_frames_in_order_by_whatever_way_they_go(seed: int) -> None:
    ways, held, frames = random.Random(seed), [], 400
    used = {"socket": 0, "transport": 0}

    async def handle(writer: WebSocketProtocol, receive) -> None:
        for number in range(frames):
            if not writer.takes_frames:
                held.append(number)
                writes: list[Write] = []
                assert not writer.gather_frames(["must not go out"], writes)
                assert not writes
                await writer.drain()
            frame = f"{number}:" + "x" * ways.choice((10, 100_000))
            if ways.random() < 0.5:
                writer.write_frames([frame])
            else:
                used["socket" if write(writer, frame) else "transport"] += 1
            # the bound that slow clients have: one frame above the transport's high-water mark
            assert writer.transport.get_write_buffer_size() < 300_000
        await receive()

    async def main() -> None:
        async with serving(handle) as url, connect(url, max_queue=1) as client:
            await asyncio.sleep(0.2)  # it does not read: the socket's buffers fill
            seen = [int((await client.recv()).split(":")[0]) for _ in range(frames)]
            assert seen == [*range(frames)]

    run(main)
    assert held
    assert used["socket"]
    assert used["transport"]


def test_a_connection_that_breaks_meanwhile_harms_no_other() -> None:
    writers: list[WebSocketProtocol] = []
    gone = asyncio.Event()

    async def handle(writer: WebSocketProtocol, receive) -> None:
        writers.append(writer)
        while (await receive())["type"] != "websocket.disconnect":
            pass
        gone.set()

    async def main() -> None:
        async with serving(handle) as url, connect(url) as stays:
            leaves = await connect(url)
            while len(writers) < 2:
                await asyncio.sleep(0.01)
            leaves.transport.abort()
            for number in range(50):
                writes: list[Write] = []
                for name, writer in zip(("stays", "leaves"), writers, strict=True):
                    writer.gather_frames([f"{name} {number}"], writes)
                write_all(writes)
                await asyncio.sleep(0)
            assert [await stays.recv() for _ in range(50)] == [f"stays {n}" for n in range(50)]
            await asyncio.wait_for(gone.wait(), 5)
            # a new connection may get the old one's descriptor
            async with connect(url) as later:
                while len(writers) < 3:
                    await asyncio.sleep(0.01)
                assert not write(writers[1], "for nobody")
                assert write(writers[2], "for you")
                assert await later.recv() == "for you"

    run(main)


def test_nothing_follows_a_close() -> None:
    async def handle(writer: WebSocketProtocol, receive) -> None:
        write(writer, "before")
        assert (await receive())["type"] == "websocket.disconnect"
        assert not write(writer, "behind")

    async def main() -> None:
        async with serving(handle) as url, connect(url) as client:
            assert await client.recv() == "before"
            await client.close()

    run(main)


async def close_by_the_application(writer: WebSocketProtocol) -> None:
    await writer.send({"type": "websocket.close"})


async def shut_down(writer: WebSocketProtocol) -> None:
    writer.shutdown()


async def fail_the_parser(writer: WebSocketProtocol) -> None:
    writer.data_received(b"\xff" * 8)  # reserved bits, no mask


async def miss_a_pong(writer: WebSocketProtocol) -> None:
    writer.keepalive_timeout()


async def close_the_transport(writer: WebSocketProtocol) -> None:
    writer.transport.close()


async def lose_the_connection(writer: WebSocketProtocol) -> None:
    writer.transport.abort()
    while not writer.disconnected:
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "end",
    [
        *(close_by_the_application, shut_down, fail_the_parser),
        *(miss_a_pong, close_the_transport, lose_the_connection),
    ],
)
def test_nothing_follows_an_end_of_the_gateway_s(
    end: Callable[[WebSocketProtocol], Awaitable[None]],
) -> None:
    left: list[bool] = []

    async def handle(writer: WebSocketProtocol, receive) -> None:
        assert write(writer, "before")
        await end(writer)
        left.append(write(writer, "behind"))
        writer.write_frames(["behind"])
        writer.transport.close()

    async def main() -> None:
        async with serving(handle) as url, asyncio.timeout(10):
            # a library's client would not show what comes behind the close
            reader, writer = await asyncio.open_connection(*url[5:-1].split(":"))
            writer.write(HANDSHAKE)
            seen = b""
            with suppress(ConnectionResetError):
                while data := await reader.read(1 << 16):
                    seen += data
            writer.close()
            assert b"behind" not in seen
            assert left == [False]

    run(main)


def test_frames_go_by_the_transport_where_the_socket_may_not_be_written_to() -> None:
    direct: list[bool] = []

    async def handle(writer: WebSocketProtocol, receive) -> None:
        writer._descriptor = -1  # as where it encrypts, see below
        direct.append(write(writer, "by the transport"))
        await receive()

    async def main() -> None:
        async with serving(handle) as url, connect(url) as client:
            assert await client.recv() == "by the transport"
            assert direct == [False]

    run(main)


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025, 70_000])
def test_a_length_on_either_side_of_those_kept_is_written_whole(length: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = bytes(range(256)) * (length // 256 + 1)
        left: list[bytes] = []
        write_all([(ours.fileno(), data[:length], left.append), (ours.fileno(), b".", left.append)])
        ours.close()
        with theirs.makefile("rb") as arrived:
            assert arrived.read() == data[:length] + b"."
        assert not left


def test_what_a_socket_does_not_take_is_left_to_its_transport() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        left: list[bytes] = []
        data = bytes(range(256)) * (1 << 14)
        write_all([(ours.fileno(), data, left.append)])
        write_all([(ours.fileno(), b"next", left.append)])
        sent = len(data) - len(left[0])
        assert 0 < sent < len(data)
        assert left == [data[sent:], b"next"]
        ours.close()
        write_all([(ours.fileno(), b"closed", left.append)])
        assert left[2:] == [b"closed"]


def test_only_plain_sockets_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        plain = {"socket": ours}
        assert raw_descriptor(SimpleNamespace(get_extra_info=plain.get)) == ours.fileno()
        encrypted = plain | {"ssl_object": object()}
        assert raw_descriptor(SimpleNamespace(get_extra_info=encrypted.get)) == -1
        assert raw_descriptor(SimpleNamespace(get_extra_info={}.get)) == -1
        monkeypatch.setattr(joint_writes, "_send", None)
        assert raw_descriptor(SimpleNamespace(get_extra_info=plain.get)) == -1
