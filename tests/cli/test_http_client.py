"""The command line's HTTP client: what it says of a gateway that does not answer."""

from __future__ import annotations

import socket

import pytest

from openlora.commands.config import ClientConfig
from openlora.commands.http_client import HttpClient
from openlora.errors import SetupError
from openlora.local import free_port


def test_a_gateway_that_takes_too_long_is_not_called_absent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(SetupError, match=r"has not answered POST /v1/adapters within 0.2 s"):
            HttpClient(ClientConfig(url, None)).post("/v1/adapters", {}, timeout_s=0.2)


def test_nobody_there():
    with pytest.raises(SetupError, match="no OpenLoRA answers at"):
        HttpClient(ClientConfig(f"http://127.0.0.1:{free_port()}", None)).get("/v1/adapters")
