"""All parts of one machine's OpenLoRA: made from the settings, started and stopped in order."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway import config as gateway_config
from openlora.commands.brokers import BROKER_LOST, REDIS_LOST
from openlora.commands.checks import check_memory, weights_in_memory
from openlora.commands.children import Child, EmbeddedServer, Part
from openlora.commands.config import DEFAULT_URL, UpConfig
from openlora.commands.instance import InstanceDir
from openlora.commands.placement import visible_gpus, worker_environments
from openlora.commands.readiness import load_view, read_readiness
from openlora.commands.screen import Screen
from openlora.commands.signals import StopSignals
from openlora.commands.supervisor import Supervisor
from openlora.protocol.status import AdapterRecord
from workers import config as worker_config

if TYPE_CHECKING:
    from openlora.commands.adapter_watch import AdapterWatch

DEMO_NAME = "SmolLM2-135M-Instruct"
_READY_POLL_S = 0.2
REDIS_TIMEOUT_S = 5.0
_ANY_ADDRESS = ("0.0.0.0", "::", "")

WORKER_LOST = "its jobs go on with their next token, at another worker or after the restart"
PRODUCER_LOST = "batches go on where they were"
GATEWAY_LOST = "clients that connect again can resume their streams"


class System:
    """Embedded servers, workers and gateway of one ``openlora up``.

    Raises (all methods):
        SetupError: one line on what cannot be started and what to do.
    """

    def __init__(
        self, config: UpConfig, environ: Mapping[str, str], screen: Screen, signals: StopSignals
    ) -> None:
        self._config = config
        self._screen = screen
        self._environ = {
            **environ,
            "OPENLORA_HOST": config.host,
            "OPENLORA_PORT": str(config.port),
            "OPENLORA_DEVICE": config.device,
            "OPENLORA_DTYPE": config.dtype,
            "PYTHONUNBUFFERED": "1",
        }
        if config.deterministic:
            self._environ["OPENLORA_DETERMINISTIC"] = "1"
        # Settings of the children are checked before anything starts, in their own words.
        self._gateway_config = _settings(gateway_config, self._environ)
        _settings(worker_config, {**self._environ, "OPENLORA_MODEL": config.model or DEMO_NAME})
        self._instance = InstanceDir(config.state_dir, config.port, config.model or DEMO_NAME)
        self._environ.setdefault("OPENLORA_BATCHES", str(self._instance.path / "batches"))
        self._watch: AdapterWatch | None = None
        self._gateway: list[Part] = []
        self._producer: list[Part] = []
        self._workers: list[Child] = []
        self._broker: list[Part] = []
        self._redis: list[Part] = []
        self.supervisor = Supervisor(
            screen,
            signals,
            verbose=config.verbose,
            drain_timeout_s=self._gateway_config.drain_timeout_s,
        )

    @property
    def url(self) -> str:
        """Where a person on this machine reaches the gateway."""
        host = "127.0.0.1" if self._config.host in _ANY_ADDRESS else self._config.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._config.port}"

    def start(self) -> None:
        """Everything up to the printed URL; returns when a first worker takes jobs."""
        model = self._prepare_model()
        check_memory(self._config, weights_in_memory(Path(model), self._config))
        self._start_brokers()
        records = self._seed_adapters(model)
        self._start_processes(model)
        self._wait_until_ready()
        self._welcome(model, records)

    def stop(self) -> bool:
        """Drain and end all parts in the order that ``supervisor`` gives the reasons of."""
        if self._watch is not None:
            self._watch.stop()
        if self._gateway:
            self._screen.line(
                "Stopping: no new work, open streams finish (Ctrl-C again stops at once)"
            )
        return self.supervisor.stop(
            [self._gateway, self._producer, self._workers, self._broker, self._redis]
        )

    def _prepare_model(self) -> str:
        if self._config.model is not None:
            return self._config.model
        from openlora.demo.model import ensure_demo_model

        with self._screen.progress(f"Preparing the demo model {DEMO_NAME}") as report:
            model = ensure_demo_model(self._config.cache_dir, report)
        self._screen.line(f"Model: {DEMO_NAME} ({model})")
        return str(model)

    def _start_brokers(self) -> None:
        from openlora.joblog import reach_redis, redis_client
        from openlora.local import embedded_broker, embedded_redis

        kafka, redis_url = self._config.kafka, self._config.redis
        if redis_url is None:
            redis_server = embedded_redis(self._instance.path / "redis")
            redis = EmbeddedServer(redis_server, REDIS_LOST, after_restart=lambda: None)
            self._redis.append(redis)
            self.supervisor.start(redis)
            redis_url = redis_server.address
        if kafka is None:
            broker_server = embedded_broker(self._instance.path)
            broker = EmbeddedServer(broker_server, BROKER_LOST, after_restart=self._make_topics)
            self._broker.append(broker)
            self.supervisor.start(broker)
            kafka = broker_server.address
        self._environ |= {"OPENLORA_KAFKA": kafka, "OPENLORA_REDIS": redis_url}
        reach_redis(redis_client(redis_url), REDIS_TIMEOUT_S)
        self._make_topics()
        embedded = [
            name
            for name, given in (("Kafka", self._config.kafka), ("Redis", self._config.redis))
            if given is None
        ]
        if embedded:
            self._screen.line(f"Embedded servers run: {', '.join(embedded)}")

    def _make_topics(self) -> None:
        from producer.topics import ensure_topics

        ensure_topics(self._environ["OPENLORA_KAFKA"], self._gateway_config.partitions)

    def _seed_adapters(self, model: str) -> list[AdapterRecord]:
        from openlora.adapters.stores import open_store
        from openlora.commands.adapter_watch import AdapterWatch, FolderChanges
        from openlora.commands.seed import adapter_dirs, hidden_size_of, register_dirs
        from openlora.joblog import redis_client
        from openlora.registry import OPERATOR, AdapterRegistry

        changes = None
        if self._config.adapters is not None:
            # Before they are listed: what appears between the two is registered twice, not never.
            changes = FolderChanges(self._config.adapters)
            dirs = adapter_dirs(self._config.adapters)
            if not dirs:
                self._screen.warn(
                    f"{self._config.adapters} has no subfolder with an adapter_config.json"
                )
        elif self._config.model is None:
            from openlora.demo.adapters import demo_adapters

            dirs = demo_adapters()
        else:
            dirs = []
        registry = AdapterRegistry(redis_client(self._environ["OPENLORA_REDIS"]))
        gateway = self._gateway_config
        store = open_store(gateway.store, gateway.adapter_cache)
        hidden_sizes = hidden_size_of(model)
        for bad in register_dirs(dirs, store, registry, hidden_sizes):
            self._screen.warn(f"Adapter {bad.name} is left out: {bad.reason}")
        if changes is not None:
            self._watch = AdapterWatch(
                changes,
                lambda dirs: register_dirs(dirs, store, registry, hidden_sizes),
                self._screen.warn,
                self._screen.line,
            )
            self._watch.start()
        return registry.list(OPERATOR)

    def _start_processes(self, model: str) -> None:
        environ = {**self._environ, "OPENLORA_MODEL": model}
        # -P: a folder named `workers` where the user stands must not be imported instead of ours.
        command = [sys.executable, "-P", "-m", "openlora"]
        logs = self._instance.logs
        places = worker_environments(
            self._config.workers, self._config.device, environ, visible_gpus(environ)
        )
        for number, place in enumerate(places, start=1):
            self._workers.append(
                Child(
                    f"worker {number}",
                    WORKER_LOST,
                    [*command, "worker"],
                    {**environ, **place},
                    logs / f"worker-{number}.log",
                )
            )
        self._gateway.append(
            Child("the gateway", GATEWAY_LOST, [*command, "gateway"], environ, logs / "gateway.log")
        )
        self._producer.append(
            Child(
                "the producer",
                PRODUCER_LOST,
                [*command, "producer"],
                environ,
                logs / "producer.log",
            )
        )
        for part in (*self._workers, *self._gateway, *self._producer):
            self.supervisor.start(part)

    def _wait_until_ready(self) -> None:
        names = {worker.pid: worker.name for worker in self._workers}
        with load_view(self._screen, [*names.values()]) as view:
            while True:
                readiness = read_readiness(self.url)
                if readiness.is_ready:
                    return
                loaded = {
                    names[pid]: share for pid, share in readiness.loaded.items() if pid in names
                }
                view.show(loaded, readiness.waiting_for if readiness.answers else ["the gateway"])
                self.supervisor.fail_if_dead()
                self.supervisor.pause(_READY_POLL_S)

    def _welcome(self, model: str, records: Sequence[AdapterRecord]) -> None:
        say = self._screen.line
        say()
        say(f"Ready: {self.url}    model {Path(model).name}, {self._config.workers} worker(s)")
        say(f"Logs:  {self._instance.logs}")
        say()
        if records:
            rows = [
                (r.id, str(r.rank), ", ".join(r.targets), f"{r.size_bytes / 1e6:.1f} MB")
                for r in records
            ]
            self._screen.table("Adapters", ("id", "rank", "targets", "size"), rows)
            say()
        command = [_own_command(), "chat"]
        if records:
            command += ["--adapter", records[0].id]
        if self.url != DEFAULT_URL:
            command += ["--url", self.url]
        say("Chat:  " + " ".join(command))
        say("Ctrl-C stops.")


def _settings(module: Any, environ: Mapping[str, str]) -> Any:
    """The settings that a child will read from ``environ``; raises what it would raise."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.config_from(parser.parse_args([]), environ)


def _own_command() -> str:
    """How to call this command line from the user's shell, so that the line can be pasted."""
    script = Path(sys.executable).with_name("openlora")
    if not script.exists():
        return f"{sys.executable} -m openlora"
    on_path = shutil.which("openlora")
    if on_path and Path(on_path).resolve() == script.resolve():
        return "openlora"
    inside = script.is_relative_to(Path.cwd())
    return str(script.relative_to(Path.cwd()) if inside else script)
