"""Runs the gateway: logging, uvicorn, signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from gateway.config import GatewayConfig
from gateway.http_protocol import HttpProtocol
from gateway.server import build_app
from gateway.system import Gateway
from gateway.ws_protocol import WebSocketProtocol
from openlora.errors import SetupError
from producer.publisher import Publisher
from producer.topics import TopicKeeper

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 << 20
"""uvicorn closes a websocket with 1009 beyond it; smaller frames over the limit get an error."""

SWITCH_INTERVAL_S = 0.0005
"""How long another thread may hold the interpreter while the event loop waits for it."""

GC_THRESHOLDS = (20_000, 20, 50)
"""A stream's tokens make no cycles; looking for some every 700 allocations took 3 % of the time."""


class Server(uvicorn.Server):
    """uvicorn, but the first SIGTERM or SIGINT drains, and only then are connections closed."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        gateway.on_failure = self._stop_failed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then leave. Second: leave at once."""
        if self._gateway.intake.draining:
            self.should_exit = True
            self.force_exit = True
        else:
            self._gateway.intake.draining = True
            self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drain = asyncio.create_task(self._drain_and_exit())

    def _stop_failed(self) -> None:
        self.should_exit = True

    async def _drain_and_exit(self) -> None:
        await self._gateway.drain()
        self.should_exit = True


def run(config: GatewayConfig) -> int:
    """Serves until SIGTERM or SIGINT; returns the process's exit status: 1 after a failure inside.

    Raises:
        SetupError: the port is taken, or a setting cannot be used.
    """
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # kafka-python speaks of every attempt to connect; what matters of it is said in our own words.
    if log.getEffectiveLevel() > logging.INFO:
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
    # Kafka's threads work in Python too: by default each may keep the event loop waiting for 5 ms.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    listener = _listen(config.host, config.port)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(config, listener))


async def _serve(config: GatewayConfig, listener: socket.socket) -> int:
    topics = TopicKeeper(config.kafka, config.partitions)
    topics.ensure()
    gateway = Gateway(config, topics, Publisher(config.kafka))
    server = Server(
        uvicorn.Config(
            build_app(gateway),
            http=HttpProtocol,
            ws=WebSocketProtocol,
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        ),
        gateway,
    )
    # What is loaded stays: a collection that looks at it would hold up every stream.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    log.info("listening on %s port %d", *listener.getsockname()[:2])
    await server.serve([listener])
    return 1 if gateway.failed else 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SetupError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, or choose "
            "another with --port"
        ) from error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it exists; it does not on Windows."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
