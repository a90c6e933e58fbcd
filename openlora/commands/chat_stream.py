"""One streamed answer over the websocket: generate, resume after a lost connection, cancel."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from openlora.commands.config import ClientConfig
from openlora.commands.http_client import unreachable
from openlora.errors import OpenLoRAError, SetupError, error_from_code

SUBPROTOCOL = Subprotocol("openlora.v1")
_REQUEST_ID = "chat"
_FIRST_RETRY_S = 0.25
_LONGEST_RETRY_S = 3.0
_GIVE_UP_S = 60.0
"""How long a lost connection is tried again before the answer is given up."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a stream ended; ``text`` is all of it."""

    text: str
    finish_reason: str
    completion_tokens: int
    total_ms: float


class AnswerStream:
    """Runs one request to its end, over as many connections as it takes.

    Attributes:
        on_text: called with each piece of text as it comes.
        on_restart: called when the job runs again from its prompt: what was shown is void.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        on_text: Callable[[str], None],
        on_restart: Callable[[], None],
    ) -> None:
        self._config = config
        self.on_text = on_text
        self.on_restart = on_restart
        self._connection: ClientConnection | None = None
        self._job_id: str | None = None
        self._last_index = -1
        self._epoch = 0
        self._texts: list[str] = []
        self._cancelled = False

    async def run(
        self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]
    ) -> Answer:
        """Ask and stream; ``options`` are further fields of the ``generate`` frame.

        Raises:
            SetupError: nothing answers, or a lost connection did not come back.
            OpenLoRAError: the error the server sent.
        """
        # With the key, a request whose "accepted" was lost can be sent again without running twice.
        generate = {
            "type": "generate",
            "request_id": _REQUEST_ID,
            "idempotency_key": secrets.token_hex(16),
            "messages": list(messages),
            **options,
        }
        lost_at: float | None = None
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                async with self._connect() as connection:
                    self._connection = connection
                    await connection.send(json.dumps(self._opening_frame(generate)))
                    if self._cancelled:
                        await self._send_cancel()
                    async for frame in connection:
                        lost_at, retry_s = None, _FIRST_RETRY_S
                        answer = self._take(json.loads(frame))
                        if answer is not None:
                            return answer
                reason = "the connection was closed"
            except InvalidStatus as error:
                raise _refused(self._config.url, error.response) from error
            except (OSError, ConnectionClosed, InvalidHandshake) as error:
                reason = str(error)
                if self._connection is None:
                    raise unreachable(self._config.url, reason) from error
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _GIVE_UP_S:
                raise unreachable(self._config.url, reason)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    async def cancel(self) -> None:
        """Stop the work at the worker; ``run`` returns when the server confirms."""
        self._cancelled = True
        try:
            await self._send_cancel()
        except ConnectionClosed:
            return  # sent again once the connection is back

    def _connect(self) -> connect:
        return connect(
            self._config.websocket_url,
            subprotocols=[SUBPROTOCOL],
            additional_headers=self._config.headers,
            max_size=None,
            proxy=None,
        )

    def _opening_frame(self, generate: dict[str, Any]) -> dict[str, Any]:
        if self._job_id is None:
            return generate
        return {
            "type": "resume",
            "request_id": _REQUEST_ID,
            "job_id": self._job_id,
            "after": self._last_index,
            "epoch": self._epoch,
        }

    async def _send_cancel(self) -> None:
        if self._connection is not None:
            await self._connection.send(json.dumps({"type": "cancel", "request_id": _REQUEST_ID}))

    def _take(self, frame: dict[str, Any]) -> Answer | None:
        """Use one server frame; returns the answer with the last one."""
        match frame["type"]:
            case "accepted":
                self._job_id = frame["job_id"]
            case "restarted":
                self._last_index = -1
                self._texts.clear()
                self.on_restart()
            case "token":
                self._last_index = frame["index"]
                self._epoch = frame.get("epoch", self._epoch)
                self._show(frame["text"])
            case "done":
                self._show(frame["text"])
                return Answer(
                    text="".join(self._texts),
                    finish_reason=frame["finish_reason"],
                    completion_tokens=frame["usage"]["completion_tokens"],
                    total_ms=frame["timings"]["total_ms"],
                )
            case "error":
                raise error_from_code(
                    frame["code"], frame["message"], retry_after_ms=frame.get("retry_after_ms")
                )
        return None

    def _show(self, text: str) -> None:
        if text:
            self._texts.append(text)
            self.on_text(text)


def _refused(url: str, response: Any) -> OpenLoRAError:
    """The error that a refused handshake carries in its body."""
    try:
        error = json.loads(response.body)["error"]
        return error_from_code(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return SetupError(f"{url} refused the websocket with status {response.status_code}")
