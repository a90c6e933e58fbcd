"""What a client sends over HTTP takes no more of the gateway's memory than it may."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.gateway.running import RunningGateway

pytestmark = pytest.mark.services

SENT_MB = 100
KEPT_MB = 50


def memory_mb(gateway: RunningGateway) -> float:
    return psutil.Process(gateway.process.pid).memory_info().rss / 1e6


@pytest.mark.parametrize("path", ["/v1/batches", "/v1/adapters", "/v1/topics/scale"])
def test_a_body_without_end_is_read_to_its_limit(gateway: RunningGateway, path: str) -> None:
    most_mb = before_mb = memory_mb(gateway)

    def endless() -> Iterator[bytes]:
        nonlocal most_mb
        for _ in range(SENT_MB):
            yield b" " * 1_000_000
            most_mb = max(most_mb, memory_mb(gateway))

    try:
        answer = httpx.post(f"{gateway.url}{path}", content=endless(), timeout=30)
    except httpx.WriteError:
        pass  # it closed while we were sending
    else:
        assert answer.status_code == 413, answer.text
        assert answer.json()["error"]["code"] == "payload_too_large"
    assert most_mb - before_mb < KEPT_MB
    assert httpx.get(f"{gateway.url}/healthz").status_code == 200


@pytest.mark.parametrize(
    "opening",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: ",
        b"GET / HTTP/1.1\r\nX-",
        b"GET /v1/ws?q=",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Trailer: ",
    ],
)
def test_a_header_without_end_is_cut_off(gateway: RunningGateway, opening: bytes) -> None:
    before_mb = memory_mb(gateway)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        try:
            connection.sendall(opening)
            for _ in range(SENT_MB):
                connection.sendall(b"a" * 1_000_000)
        except (ConnectionError, TimeoutError):
            pass
        else:
            pytest.fail(f"the gateway took a header of {SENT_MB} MB")
        assert memory_mb(gateway) - before_mb < KEPT_MB
    assert httpx.get(f"{gateway.url}/healthz").status_code == 200


def test_a_head_over_the_limit_is_told_so_and_one_below_is_taken(gateway: RunningGateway) -> None:
    def answered(bytes_long: int) -> httpx.Response:
        return httpx.get(f"{gateway.url}/healthz", headers={"X-Long": "a" * bytes_long})

    assert answered(40_000).status_code == 200
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 60_000)
        connection.sendall(b"a" * 10_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 431 ")
