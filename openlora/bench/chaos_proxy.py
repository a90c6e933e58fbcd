"""A TCP proxy whose network can be bad: cut, held, slow. One thread for all proxies of a run."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 16


class ProxyThread:
    """The event loop that proxies live on, in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait for the result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def call(self, function: Callable[[], None]) -> None:
        """Call on the loop; does not wait."""
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """End the thread, and with it all connections."""

        async def end_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(end_all())
        self.call(self._loop.stop)
        self._thread.join(5)


class Proxy:
    """Forwards connections of ``port`` to ``target_port``; both are of 127.0.0.1."""

    def __init__(self, thread: ProxyThread, target_port: int, port: int = 0) -> None:
        self.delay_s = 0.0
        self._thread = thread
        self._target_port = target_port
        self._links: set[_Link] = set()
        self._gate = asyncio.Event()
        self._gate.set()
        self._server = thread.run(asyncio.start_server(self._serve, HOST, port))
        self.port = int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        """Reset all connections that there are; new ones are let through."""

        def reset_links() -> None:
            for link in [*self._links]:
                link.reset()

        self._thread.call(reset_links)

    def hold(self) -> None:
        """Nothing moves any more, on old connections and new ones, until ``release``."""
        self._thread.call(self._gate.clear)

    def hold_old(self) -> None:
        """Connections that there are stand still until ``release``; new ones are let through, so
        that what is sent on them overtakes what was sent before."""

        def close_gates() -> None:
            for link in self._links:
                link.gate.clear()

        self._thread.call(close_gates)

    def release(self) -> None:
        """Everything moves again."""

        def open_gates() -> None:
            self._gate.set()
            for link in self._links:
                link.gate.set()

        self._thread.call(open_gates)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._gate.wait()
        try:
            far = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, far[1])
        self._links.add(link)
        pumps = (self._pump(link, reader, far[1]), self._pump(link, far[0], writer))
        await asyncio.gather(*pumps, return_exceptions=True)
        self._links.discard(link)
        link.reset()

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._gate.wait()
                await link.gate.wait()
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            link.reset()  # a reset of one side is one for the other


class _Link:
    """One forwarded connection."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self._writers = (near, far)

    def reset(self) -> None:
        for writer in self._writers:
            if writer.transport.is_closing():
                continue
            # Without lingering a close is a reset: that is what a cut connection looks like.
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
