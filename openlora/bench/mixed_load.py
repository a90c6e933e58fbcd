"""The loads of ``bench mixed``: a batch over HTTP, interactive requests by websocket."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from websockets.sync.client import ClientConnection, connect

from openlora.bench.pipeline_plan import ClientPlan, ClientResult, StreamRequest
from openlora.errors import SetupError

POLL_S, LAST_POLL_S = 0.5, 0.1
"""Each look takes CPU time from what is measured: it is short for a batch's last tenth alone."""
TIMEOUT_S = 300.0
_OVER = ("completed", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked: ``lines`` prompts for ``tokens`` tokens each, over ``adapters`` in turn.

    Attributes:
        first: number of the first prompt; no two numbers have the same, so that no load profits
            from another's prefixes.
        prompt_chars: the prompts' least length.
    """

    lines: int
    tokens: int
    adapters: tuple[str, ...]
    first: int = 0
    prompt_chars: int = 0

    def prompt(self, number: int) -> str:
        """Of a line."""
        number += self.first
        text = f"{number * 7919}: tell what happened on day {number} of the voyage."
        more = self.prompt_chars - len(text)
        return (
            text + (" The wind was fair and the sea was calm." * (more // 40 + 1))[: max(0, more)]
        )

    def adapter(self, number: int) -> str | None:
        """Of a line; the base model takes its turn too."""
        choices = (None, *self.adapters)
        return choices[number % len(choices)]

    def batch_file(self) -> bytes:
        """The lines as a batch's input."""
        lines = []
        for number in range(self.lines):
            line: dict[str, Any] = {
                "prompt": self.prompt(number),
                "max_tokens": self.tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            adapter = self.adapter(number)
            lines.append(json.dumps(line | ({"adapter": adapter} if adapter else {})))
        return "\n".join(lines).encode() + b"\n"


@dataclass(slots=True)
class Interactive:
    """First-token times and the times between tokens, in ms."""

    first_ms: list[float] = field(default_factory=list)
    between_ms: list[float] = field(default_factory=list)

    def first(self, percentile: int) -> float:
        """A percentile of the first-token times."""
        return percentile_of(self.first_ms, percentile)

    @property
    def step_ms(self) -> float:
        """The engine's step: what lies between two tokens of a stream, at the median."""
        return statistics.median(self.between_ms)


def run_streams(url: str, load: Workload) -> float:
    """All requests of ``load`` at once, a websocket for each, from a process of its own; → tokens
    received per second, from the first request to the last end."""
    plan = ClientPlan(
        url=url.replace("http", "ws", 1) + "/v1/ws",
        relay=False,
        streams=load.lines,
        tokens=load.tokens,
        limit_s=TIMEOUT_S,
        requests=tuple(
            StreamRequest(load.prompt(number), load.adapter(number)) for number in range(load.lines)
        ),
    )
    argument = msgspec.json.encode(plan).decode()
    client = subprocess.run(
        [sys.executable, "-m", "openlora.bench.pipeline_client", argument],
        stdout=subprocess.PIPE,
        check=False,
    )
    if client.returncode != 0:
        raise SetupError(f"the client of the streams ended with status {client.returncode}")
    result = msgspec.json.decode(client.stdout.splitlines()[-1], type=ClientResult)
    if result.errors:
        raise SetupError(f"{len(result.errors)} streams failed: {result.errors[0]}")
    return result.tokens / result.seconds


class Client:
    """Talks to a running system at ``url``."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.Client(base_url=url, timeout=30)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, data: bytes) -> str:
        """Make a batch of ``data``; → its ID."""
        form = {"purpose": "batch"}
        file = self._checked(self._http.post("/v1/files", data=form, files={"file": data}))
        batch = self._checked(self._http.post("/v1/batches", json={"input_file_id": file["id"]}))
        return str(batch["id"])

    def batch(self, batch_id: str) -> dict[str, Any]:
        """The batch as it is now."""
        batch: dict[str, Any] = self._checked(self._http.get(f"/v1/batches/{batch_id}"))
        return batch

    def cancel(self, batch_id: str) -> None:
        """End a batch, and wait until it is over."""
        self._checked(self._http.post(f"/v1/batches/{batch_id}/cancel"))
        self._wait(lambda batch: batch["status"] in _OVER, batch_id)

    def wait_for_tokens(self, batch_id: str, tokens: int) -> None:
        """Until the batch's finished lines hold at least ``tokens`` tokens."""
        self._wait(lambda batch: batch["progress"]["completion_tokens"] >= tokens, batch_id)

    def run_batch(self, data: bytes) -> tuple[dict[str, Any], float]:
        """Run a batch to its end; → it, and the seconds from submission to the last line done."""
        began = time.perf_counter()
        batch_id = self.submit(data)
        lines = data.count(b"\n")
        for done, poll_s in ((int(lines * 0.9), POLL_S), (lines, LAST_POLL_S)):
            self._wait(
                lambda batch, done=done: batch["progress"]["lines_done"] >= done, batch_id, poll_s
            )
        seconds = time.perf_counter() - began
        self._wait(lambda batch: batch["status"] in _OVER, batch_id)
        return self.batch(batch_id), seconds

    def ask(self, requests: int, tokens: int, pause_s: float) -> Interactive:
        """``requests`` one after the other, with a pause between them: somebody chats."""
        seen = Interactive()
        with connect(self._url.replace("http", "ws", 1) + "/v1/ws", open_timeout=30) as socket:
            for number in range(requests):
                self._ask_once(socket, number, tokens, seen)
                time.sleep(pause_s)
        return seen

    def _ask_once(
        self, socket: ClientConnection, number: int, tokens: int, seen: Interactive
    ) -> None:
        request = {
            "type": "generate",
            "request_id": str(number),
            "prompt": f"{number * 104_729}: what is the moon?",
            "params": {"max_tokens": tokens, "temperature": 0, "ignore_eos": True},
        }
        sent = last = time.perf_counter()
        socket.send(json.dumps(request))
        while True:
            frame = json.loads(socket.recv(timeout=TIMEOUT_S))
            now = time.perf_counter()
            if frame["type"] == "error":
                raise SetupError(f"an interactive request failed: {frame['message']}")
            if frame["type"] == "done":
                return
            if frame["type"] == "token":
                if frame["index"] == 0:
                    seen.first_ms.append((now - sent) * 1e3)
                else:
                    seen.between_ms.append((now - last) * 1e3)
                last = now

    def _wait(self, is_there: Any, batch_id: str, poll_s: float = POLL_S) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_there(batch := self.batch(batch_id)):
            if batch["status"] == "failed" or time.monotonic() > deadline:
                raise SetupError(f"the batch does not come to its end: {batch}")
            time.sleep(poll_s)

    def _checked(self, response: httpx.Response) -> Any:
        if not response.is_success:
            raise SetupError(f"{response.url} answered {response.status_code}: {response.text}")
        return response.json()


def percentile_of(values: Sequence[float], percentile: int) -> float:
    """The nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, len(ranked) * percentile // 100)]
