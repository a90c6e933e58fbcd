"""What is checked before anything starts: each failure is one line that says what to do."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from openlora.commands.config import UpConfig
from openlora.engine.host_memory import available_memory
from openlora.errors import SetupError

SERVE_PACKAGES = (
    *("msgspec", "kafka", "redis", "starlette", "uvicorn", "websockets", "jinja2"),
    *("prometheus_client", "rich", "httpx", "psutil", "celery"),
)
"""Import names that the extra ``serve`` brings."""
ENGINE_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")
"""Import names that the engine alone needs."""

PROCESS_BYTES = 500 * 1024**2
"""Memory of one worker or gateway beside the model's weights: Python, torch, KV cache."""


def missing_packages(names: Iterable[str]) -> list[str]:
    """The import names that are not installed, without importing any."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def check_packages() -> None:
    """Raise SetupError naming every missing package and the command that brings them."""
    missing = missing_packages((*ENGINE_PACKAGES, *SERVE_PACKAGES))
    if missing:
        raise SetupError(
            f"not installed: {', '.join(missing)}; run `pip install 'openlora[serve]'`"
        )


def check_port(host: str, port: int) -> None:
    """Raise SetupError where nobody can listen on ``host:port``."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise SetupError(f"host is {host!r}; it cannot be resolved ({error.strerror})") from error
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: a port in TIME_WAIT from our last run is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise SetupError(
                f"port {port} of {host} cannot be used ({error.strerror}); stop what listens "
                f"there or choose another one: --port {port + 1 if port < 65535 else port - 1}"
            ) from error


def check_memory(config: UpConfig, model_bytes: int) -> None:
    """Raise SetupError where the memory that is free, here or in this container, is less than the
    processes will take.

    ``model_bytes``: the weights of one worker as they lie in memory; 0 where unknown.
    """
    needed = config.workers * (model_bytes + PROCESS_BYTES) + PROCESS_BYTES
    available = available_memory()
    if available < needed:
        raise SetupError(
            f"{available / 1e9:.1f} GB of memory are free and about {needed / 1e9:.1f} GB are "
            f"needed ({config.workers} worker(s), model weights {model_bytes / 1e9:.1f} GB each); "
            "close something, or use fewer workers or a smaller model"
        )


def weights_in_memory(model: Path, config: UpConfig) -> int:
    """Bytes of the weights of ``model`` once loaded into host memory; 0 for a hub ID.

    On a GPU they only pass through. On the CPU 16-bit files are computed in float32 unless
    ``--dtype`` says otherwise.
    """
    if config.device == "cuda" or (config.device == "auto" and Path("/dev/nvidia0").exists()):
        return 0
    files: Sequence[Path] = [model] if model.is_file() else list(model.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files if file.exists())
    return size if config.dtype in ("bfloat16", "float16") else 2 * size
