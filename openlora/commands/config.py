"""Settings of the command line: flags first, then environment. Nothing else here reads either."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from openlora.errors import SetupError

ENVIRONMENT: dict[str, str] = {
    "OPENLORA_MODEL": "model directory, GGUF file or hub ID; default: the demo model",
    "OPENLORA_ADAPTERS": "folder with one PEFT adapter per subfolder; default: the demo's adapters "
    "(in the environment, a URL like s3://… names the adapter store)",
    "OPENLORA_KAFKA": "Kafka bootstrap servers, host:port[,host:port…]; default: embedded",
    "OPENLORA_REDIS": "Redis URL, redis://[:password@]host:port/0; default: embedded",
    "OPENLORA_HOST": "address the gateway listens on (default 127.0.0.1)",
    "OPENLORA_PORT": "port the gateway listens on (default 8000)",
    "OPENLORA_DEVICE": "auto, cpu or cuda",
    "OPENLORA_DTYPE": "auto, float32, bfloat16 or float16",
    "OPENLORA_DETERMINISTIC": "1: a request's logits do not depend on what else runs, bit for bit "
    "(CUDA only, slower; default 0)",
    "OPENLORA_WORKERS": "number of workers (default 1)",
    "OPENLORA_URL": "the running system that client commands talk to",
    "OPENLORA_API_KEY": "the key that client commands send",
    "OPENLORA_REDIS_PASSWORD": "password of `openlora brokers`' Redis server (default: drawn)",
}

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
DEFAULT_URL = f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_WORKERS = 256


@dataclass(frozen=True, slots=True)
class UpConfig:
    """What ``openlora up`` is to start.

    ``model`` None: the demo model. ``adapters`` None: the demo's adapters with the demo model,
    none with another. ``kafka``/``redis`` None: an embedded server. ``cache_dir`` keeps what can
    be made again, ``state_dir`` the embedded Redis server's data and all logs.
    """

    model: str | None
    adapters: Path | None
    workers: int
    host: str
    port: int
    device: str
    dtype: str
    kafka: str | None
    redis: str | None = field(repr=False)  # its URL may hold a password
    cache_dir: Path
    state_dir: Path
    verbose: bool
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Where a running system answers, and the key to send; ``url`` has no trailing slash."""

    url: str
    api_key: str | None = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def websocket_url(self) -> str:
        """The websocket endpoint of the same system."""
        return "ws" + self.url.removeprefix("http") + "/v1/ws"


def add_up_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``openlora up``. Defaults come from the environment, in ``up_config``."""
    for flag, metavar in (
        ("--model", "M"),
        ("--adapters", "DIR"),
        ("--workers", "N"),
        ("--host", "H"),
        ("--port", "P"),
        ("--device", "D"),
        ("--dtype", "T"),
        ("--kafka", "SERVERS"),
        ("--redis", "URL"),
    ):
        name = f"OPENLORA_{flag.removeprefix('--').upper()}"
        parser.add_argument(flag, metavar=metavar, help=f"{ENVIRONMENT[name]} [{name}]")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help=f"{ENVIRONMENT['OPENLORA_DETERMINISTIC']} [OPENLORA_DETERMINISTIC]",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the logs of every process, prefixed"
    )


def up_config(args: argparse.Namespace, environ: Mapping[str, str]) -> UpConfig:
    """The settings of ``openlora up``.

    Raises:
        SetupError: naming the setting, its value and what is allowed.
    """

    def setting(name: str) -> str | None:
        return getattr(args, name) or environ.get(f"OPENLORA_{name.upper()}") or None

    adapters = setting("adapters")
    if not args.adapters and "://" in (adapters or ""):
        adapters = None  # the store, which gateway and workers read from the environment
    if adapters is not None and not Path(adapters).expanduser().is_dir():
        raise SetupError(f"adapters is {adapters!r}; it must be an existing folder")
    return UpConfig(
        model=_model(setting("model")),
        adapters=Path(adapters).expanduser() if adapters else None,
        workers=_integer("workers", setting("workers") or "1", 1, MAX_WORKERS),
        host=setting("host") or DEFAULT_HOST,
        port=_integer("port", setting("port") or str(DEFAULT_PORT), 1, 65535),
        device=_one_of("device", setting("device"), DEVICES),
        dtype=_one_of("dtype", setting("dtype"), DTYPES),
        kafka=_kafka(setting("kafka")),
        redis=_redis(setting("redis")),
        cache_dir=cache_dir(environ),
        state_dir=state_dir(environ),
        verbose=args.verbose,
        # In the environment it is the workers' own to check.
        deterministic=args.deterministic,
    )


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that talks to a running system."""
    parser.add_argument("--url", metavar="URL", help=f"the system [OPENLORA_URL, {DEFAULT_URL}]")


def client_config(args: argparse.Namespace, environ: Mapping[str, str]) -> ClientConfig:
    """The settings of a client command. Raises SetupError for a URL that is none."""
    url = (args.url or environ.get("OPENLORA_URL") or DEFAULT_URL).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SetupError(f"the URL is {url!r}; it must look like {DEFAULT_URL}")
    return ClientConfig(url=url, api_key=environ.get("OPENLORA_API_KEY") or None)


def process_environment() -> dict[str, str]:
    """A copy of this process's environment: what settings are read from and children get."""
    return dict(os.environ)


def cache_dir(environ: Mapping[str, str]) -> Path:
    """OpenLoRA's cache directory of this user."""
    return _base_dir(environ, "XDG_CACHE_HOME", ".cache")


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where data of embedded servers and logs of this user's processes are kept."""
    return _base_dir(environ, "XDG_STATE_HOME", ".local/state")


def redis_password(environ: Mapping[str, str]) -> str | None:
    """The password that the embedded Redis server is to ask for; None: one is drawn."""
    return environ.get("OPENLORA_REDIS_PASSWORD") or None


def _base_dir(environ: Mapping[str, str], variable: str, fallback: str) -> Path:
    base = environ.get(variable)
    return (Path(base) if base else Path.home() / fallback) / "openlora"


def _integer(name: str, value: str, low: int, high: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise SetupError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
    return number


def _one_of(name: str, value: str | None, allowed: tuple[str, ...]) -> str:
    chosen = value or allowed[0]
    if chosen not in allowed:
        raise SetupError(f"{name} is {chosen!r}; it must be one of {', '.join(allowed)}")
    return chosen


def _model(value: str | None) -> str | None:
    """A path is made absolute and must exist; ``owner/name`` that is no path is a hub ID."""
    if value is None:
        return None
    path = Path(value).expanduser()
    if path.exists():
        return str(path.resolve())
    if value.startswith((".", "/", "~")) or value.count("/") != 1:
        raise SetupError(f"model is {value!r}; there is no such file or folder")
    return value


def _kafka(value: str | None) -> str | None:
    for server in (value or "").split(",") if value else ():
        host, _, port = server.strip().rpartition(":")
        if not host or not port.isdigit():
            raise SetupError(f"kafka is {value!r}; it must be host:port[,host:port…]")
    return value


def _redis(value: str | None) -> str | None:
    if value and urlsplit(value).scheme not in ("redis", "rediss", "unix"):
        raise SetupError("redis must be a URL like redis://:password@host:6379/0")
    return value
