"""Servers that tests talk to, as real processes."""

from __future__ import annotations

import os
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from openlora.errors import SetupError
from openlora.local import ServerProcess, ServerSpec, embedded_broker, embedded_redis, free_port
from openlora.local.probes import kafka_answers

KAFKA_START_S = 60.0
"""Apache Kafka is ready in 3 s on an idle machine, 11 s after a kill, more while others compile."""


def kafka_missing() -> str | None:
    """Why Apache Kafka cannot run here; None where it can."""
    if not kafka_program().exists():
        return f"{kafka_program()} does not exist"
    if shutil.which("java") is None:
        return "Java is not installed"
    return None


def kafka_program() -> Path:
    return Path(__file__).resolve().parents[2] / "shared" / "kafka" / "kafka-server"


def apache_kafka(data_dir: Path) -> ServerProcess:
    """Apache Kafka on a free port, not started yet; the same ``data_dir`` keeps what it held."""
    port = _free_port_pair()
    data_dir.mkdir(parents=True, exist_ok=True)
    spec = ServerSpec(
        name="Apache Kafka",
        argv=(str(kafka_program()), str(data_dir / "kafka"), str(port)),
        port=port,
        address=f"127.0.0.1:{port}",
        is_ready=partial(kafka_answers, "127.0.0.1", port),
        env={"KAFKA_HEAP": "384m"},
    )
    return ServerProcess(spec, data_dir / "kafka.log")


def _free_port_pair() -> int:
    """A free port whose successor is free too (Kafka's controller listens there)."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
        return port


def start_broker(kind: str, data_dir: Path) -> ServerProcess:
    """A running broker: "tansu" (embedded) or "kafka"; skips the test where it is missing."""
    if kind == "kafka":
        reason = kafka_missing()
        if reason is not None:
            pytest.skip(f"Apache Kafka: {reason}")
        server = apache_kafka(data_dir)
        server.start(KAFKA_START_S)
        return server
    try:
        server = embedded_broker(data_dir)
    except SetupError as error:
        skip_or_fail(error.message)
    server.start()
    return server


def start_redis(data_dir: Path) -> ServerProcess:
    """A running embedded Redis server."""
    try:
        server = embedded_redis(data_dir)
    except SetupError as error:
        skip_or_fail(error.message)
    server.start()
    return server


def skip_or_fail(reason: str) -> NoReturn:
    """A missing service skips the test here and fails it in CI, where it must not go unnoticed."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
