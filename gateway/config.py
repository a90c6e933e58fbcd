"""Settings of the gateway: flags first, then environment, then defaults. Frozen."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from gateway.auth import ApiKeys, check_host, check_origin, is_loopback
from gateway.keys import read_key_file
from openlora.adapters.stores import StoreLocation, adapter_cache, store_setting
from openlora.errors import SetupError
from producer.bulk.config import batches_dir

T = TypeVar("T")

_ORIGIN = re.compile(r"https?://[^/\s@*?#]+", re.IGNORECASE)
LOG_LEVELS = ("debug", "info", "warning", "error")

ENVIRONMENT = {
    "OPENLORA_HOST": "address to listen on (default 127.0.0.1)",
    "OPENLORA_PORT": "port to listen on (default 8000)",
    "OPENLORA_KAFKA": "Kafka bootstrap servers, host:port separated by commas",
    "OPENLORA_REDIS": "Redis URL, redis://[:password@]host:port[/database]",
    "OPENLORA_PARTITIONS": "partitions of the job topics when they are created (default 32)",
    "OPENLORA_API_KEYS": "keys, `key` or `tenant:key` separated by commas (default: no keys asked)",
    "OPENLORA_API_KEYS_FILE": "file of hashed keys, made by `openlora keys new` (default: none)",
    "OPENLORA_ORIGINS": "origins of other sites whose pages may call, separated by commas, like "
    "https://chat.example (default: this host's own pages alone)",
    "OPENLORA_STORE": "content-addressed adapter files: a directory that workers share, or a URL "
    "(s3://, gs://, …; OPENLORA_ADAPTERS names one as well)",
    "OPENLORA_ADAPTER_CACHE": "folder for adapters on their way to a store that is a URL",
    "OPENLORA_REMOTE_ADAPTERS": "URL prefixes whose adapters requests may name without adding them "
    "first, separated by commas, like hf://acme/ (default: none)",
    "OPENLORA_ADAPTER_SOURCES": "URL prefixes that tenants may add adapters from, separated by "
    "commas, like hf://acme/ (default: none; keys without a tenant may use any)",
    "OPENLORA_BATCHES": "folder of batches' input and result files, shared with producers",
    "OPENLORA_MAX_BATCHES": "batches that a tenant may have under way (default 32)",
    "OPENLORA_DISCONNECT_GRACE_S": "seconds a job runs on after its client left (default 30)",
    "OPENLORA_DRAIN_TIMEOUT_S": "seconds that streams may take to end after SIGTERM (default 30)",
    "OPENLORA_MAX_TENANT_JOBS": "jobs of one tenant under way at once (default 2048)",
    "OPENLORA_MAX_ADAPTER_JOBS": "jobs of one tenant with one adapter under way at once (default "
    "1024)",
    "OPENLORA_MAX_WAIT_S": "seconds a job may have to wait; more, and it is refused (default 60)",
    "OPENLORA_LOG_LEVEL": "debug, info, warning or error (default warning)",
}


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Everything the gateway is told from outside.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        kafka: bootstrap servers. redis: URL, its password included, so it is not shown.
        partitions: number of partitions of job topics this gateway has to create.
        api_keys: who may call; empty asks for no key.
        origins: of other sites whose pages may call.
        store: root of the content-addressed store, a directory or a URL.
        adapter_cache: directory for what is on its way to a remote store.
        remote_adapters: URL prefixes that requests may name adapters by.
        adapter_sources: URL prefixes that tenants with a name may add adapters from.
        batches: root of the file store. max_batches: open batches of one tenant.
        disconnect_grace_s: a stream that nobody watched for so long is cancelled.
        drain_timeout_s: streams may go on for so long after SIGTERM.
        max_tenant_jobs, max_adapter_jobs: open jobs of a tenant, and of those with one adapter;
            further ones are refused.
        max_wait_s: jobs are refused where they would wait longer.
        log_level: least severity that is logged.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    kafka: str = "127.0.0.1:9092"
    redis: str = field(default="redis://127.0.0.1:6379/0", repr=False)
    partitions: int = 32
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    origins: tuple[str, ...] = ()
    store: StoreLocation = field(default_factory=lambda: store_setting(None, {}))
    adapter_cache: Path = field(default_factory=lambda: adapter_cache({}))
    remote_adapters: tuple[str, ...] = ()
    adapter_sources: tuple[str, ...] = ()
    batches: Path = field(default_factory=lambda: batches_dir({}))
    max_batches: int = 32
    disconnect_grace_s: float = 30.0
    drain_timeout_s: float = 30.0
    max_tenant_jobs: int = 2048
    max_adapter_jobs: int = 1024
    max_wait_s: float = 60.0
    log_level: str = "warning"

    def check_page(self, origin: str | None, host: str | None) -> None:
        """Lets a browser act from pages of this gateway, or of ``origins``. Raises Forbidden."""
        check_origin(origin, host, self.origins)
        if is_loopback(self.host) and not self.api_keys.required:
            check_host(host, self.origins)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the gateway's flags; none has a default, so that the environment comes second."""

    def flag(name: str, variable: str) -> None:
        parser.add_argument(name, metavar="VALUE", help=f"{ENVIRONMENT[variable]} [{variable}]")

    flag("--host", "OPENLORA_HOST")
    flag("--port", "OPENLORA_PORT")
    flag("--kafka", "OPENLORA_KAFKA")
    flag("--redis", "OPENLORA_REDIS")
    flag("--partitions", "OPENLORA_PARTITIONS")
    flag("--api-keys-file", "OPENLORA_API_KEYS_FILE")
    flag("--origins", "OPENLORA_ORIGINS")
    flag("--store", "OPENLORA_STORE")
    flag("--adapter-sources", "OPENLORA_ADAPTER_SOURCES")
    flag("--remote-adapters", "OPENLORA_REMOTE_ADAPTERS")
    flag("--batches", "OPENLORA_BATCHES")
    flag("--max-batches", "OPENLORA_MAX_BATCHES")
    flag("--disconnect-grace-s", "OPENLORA_DISCONNECT_GRACE_S")
    flag("--drain-timeout-s", "OPENLORA_DRAIN_TIMEOUT_S")
    flag("--max-tenant-jobs", "OPENLORA_MAX_TENANT_JOBS")
    flag("--max-adapter-jobs", "OPENLORA_MAX_ADAPTER_JOBS")
    flag("--max-wait-s", "OPENLORA_MAX_WAIT_S")
    flag("--log-level", "OPENLORA_LOG_LEVEL")


def config_from(args: argparse.Namespace, environ: Mapping[str, str]) -> GatewayConfig:
    """The settings from parsed flags and an environment.

    API keys come from the environment alone: a flag would show them to every user of the machine.

    Raises:
        SetupError: a value is unusable; names the flag or variable, the value and what it must be.
    """
    default = GatewayConfig()

    def setting(name: str, parse: Callable[[str, str], T], otherwise: T) -> T:
        variable = f"OPENLORA_{name.upper()}"
        flag_value = getattr(args, name, None)
        if flag_value is not None:
            return parse(f"--{name.replace('_', '-')}", str(flag_value))
        return parse(variable, environ[variable]) if environ.get(variable) else otherwise

    return GatewayConfig(
        host=setting("host", _text, default.host),
        port=setting("port", _integer(0, 65535), default.port),
        kafka=setting("kafka", _servers, default.kafka),
        redis=setting("redis", _redis_url, default.redis),
        partitions=setting("partitions", _integer(1, 10_000), default.partitions),
        api_keys=ApiKeys.parse(environ.get("OPENLORA_API_KEYS", "")).with_entries(
            setting("api_keys_file", lambda name, value: read_key_file(_path(name, value)), [])
        ),
        origins=setting("origins", _origins, default.origins),
        store=store_setting(getattr(args, "store", None), environ),
        adapter_cache=adapter_cache(environ),
        remote_adapters=setting("remote_adapters", _prefixes, default.remote_adapters),
        adapter_sources=setting("adapter_sources", _prefixes, default.adapter_sources),
        batches=setting("batches", _path, batches_dir(environ)),
        max_batches=setting("max_batches", _integer(1, 100_000), default.max_batches),
        disconnect_grace_s=setting(
            "disconnect_grace_s", _seconds(0.5, 86_400), default.disconnect_grace_s
        ),
        drain_timeout_s=setting("drain_timeout_s", _seconds(0, 86_400), default.drain_timeout_s),
        max_tenant_jobs=setting("max_tenant_jobs", _integer(1, 1 << 20), default.max_tenant_jobs),
        max_adapter_jobs=setting(
            "max_adapter_jobs", _integer(1, 1 << 20), default.max_adapter_jobs
        ),
        max_wait_s=setting("max_wait_s", _seconds(0.1, 86_400), default.max_wait_s),
        log_level=setting("log_level", _log_level, default.log_level),
    )


def _text(name: str, value: str) -> str:
    return value


def _path(name: str, value: str) -> Path:
    return Path(value).expanduser()


def _prefixes(name: str, value: str) -> tuple[str, ...]:
    prefixes = tuple(filter(None, map(str.strip, value.split(","))))
    for prefix in prefixes:
        # Without the slash, hf://acme would let hf://acme-evil through.
        if "://" not in prefix or not prefix.endswith("/"):
            raise SetupError(f"{name} has {prefix!r}; a prefix looks like hf://acme/")
    return prefixes


def _origins(name: str, value: str) -> tuple[str, ...]:
    origins = tuple(filter(None, map(str.strip, value.split(","))))
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise SetupError(
                f"{name} has {origin!r}; an origin is https://host[:port], as browsers send it: "
                "no path, no pattern"
            )
    return tuple(map(str.lower, origins))


def _log_level(name: str, value: str) -> str:
    if value not in LOG_LEVELS:
        raise SetupError(f"{name} is {value!r}; it must be one of {', '.join(LOG_LEVELS)}")
    return value


def _integer(low: int, high: int) -> Callable[[str, str], int]:
    def parse(name: str, value: str) -> int:
        if not value.isascii() or not value.isdigit() or not low <= int(value) <= high:
            raise SetupError(f"{name} is {value!r}; it must be a whole number, {low} to {high}")
        return int(value)

    return parse


def _seconds(low: float, high: float) -> Callable[[str, str], float]:
    def parse(name: str, value: str) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = float("nan")
        if not low <= seconds <= high:
            raise SetupError(f"{name} is {value!r}; it must be seconds, {low:g} to {high:g}")
        return seconds

    return parse


def _servers(name: str, value: str) -> str:
    for server in value.split(","):
        host, _, port = server.strip().rpartition(":")
        if not host or not port.isdigit():
            raise SetupError(f"{name} is {value!r}; it must be host:port[,host:port…]")
    return value


def _redis_url(name: str, value: str) -> str:
    if not value.startswith(("redis://", "rediss://", "unix://")):
        # the value may hold a password, so it is not repeated
        raise SetupError(f"{name} must be a URL like redis://[:password@]host:port[/database]")
    return value
