"""A whole system of real processes, any of which can be killed, stopped and started again."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from openlora.bench.chaos_proxy import Proxy, ProxyThread
from openlora.bench.pipeline_model import write_tokenizer
from openlora.errors import SetupError
from openlora.local import ServerProcess, embedded_broker, embedded_redis, free_port
from openlora.local.process import die_with_parent
from producer.topics import ensure_topics

READY_TIMEOUT_S = 90.0
_POLL_S = 0.05


class Process:
    """One of our programs: its newest process, and how to start the next one."""

    def __init__(self, name: str, argv: list[str], environ: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log_path = log
        self._argv = [sys.executable, "-P", "-m", *argv]
        self._environ = {**os.environ, **environ}
        self._child: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        """Start it (again); call from a thread that outlives it."""
        self.starts += 1
        with self.log_path.open("ab") as log:
            self._child = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    @property
    def pid(self) -> int:
        """Process ID of the newest process."""
        assert self._child is not None
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether it lives (stopped counts)."""
        return self._child is not None and self._child.poll() is None

    def engine_pid(self) -> int | None:
        """A worker's engine process."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return None
        return children[0].pid if children else None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it lives."""
        if self.running:
            os.kill(self.pid, number)

    def end(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL after ``timeout_s``; returns with it gone."""
        if self._child is None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def log_text(self) -> str:
        """All it has logged, over all its lives."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """What to start.

    Attributes:
        engine: a worker's ``--engine``; ``model``: its ``--model``, None: a tokenizer alone.
        proxied: everything talks through proxies, so that the network can be bad.
        worker_flags, gateway_environ: added settings.
    """

    workers: int = 2
    gateways: int = 2
    partitions: int = 8
    engine: str = "scripted:20"
    model: Path | None = None
    proxied: bool = False
    worker_flags: tuple[str, ...] = ()
    gateway_environ: Mapping[str, str] = field(default_factory=dict)


class ChaosSystem:
    """Broker, Redis, gateways and workers on free ports, with ``folder`` for their data and logs.

    Args:
        broker: a broker that runs already and is the caller's to end; None: an embedded one.
    """

    def __init__(self, folder: Path, plan: ChaosPlan, broker: ServerProcess | None = None) -> None:
        self.plan = plan
        self.folder = folder
        self.workers: list[Process] = []
        self.gateways: list[Process] = []
        self.proxies: dict[str, list[Proxy]] = {"client": [], "redis": [], "kafka": []}
        self._ports: list[int] = []
        self._thread = ProxyThread() if plan.proxied else None
        self._owns_broker = broker is None
        self.redis = embedded_redis(folder / "redis")
        self.broker = broker or self._embedded_broker()
        self.model = plan.model or write_tokenizer(folder / "model")
        self.keeps_messages = not self._owns_broker

    def _embedded_broker(self) -> ServerProcess:
        (self.folder / "broker").mkdir(parents=True, exist_ok=True)
        server = embedded_broker(self.folder / "broker")
        if self._thread is None:
            return server
        # Clients go where the broker tells them to: that has to be the proxy.
        proxy = Proxy(self._thread, server.spec.port)
        self.proxies["kafka"].append(proxy)
        direct, through = f"tcp://127.0.0.1:{server.spec.port}", f"tcp://127.0.0.1:{proxy.port}"
        argv = list(server.spec.argv)
        argv[argv.index("--advertised-listener-url") + 1] = through
        assert direct in argv
        spec = dataclasses.replace(server.spec, argv=tuple(argv), address=f"127.0.0.1:{proxy.port}")
        return ServerProcess(spec, server.log_path)

    def start(self) -> None:
        """Everything, up to ready workers and gateways."""
        self.redis.start()
        if self._owns_broker:
            self.broker.start()
        ensure_topics(self.broker.address, self.plan.partitions)
        for _ in range(self.plan.gateways):
            self.add_gateway()
        for _ in range(self.plan.workers):
            self.add_worker()
        for gateway in self.gateways:
            gateway.start()
        for worker in self.workers:
            worker.start()
        self.wait_ready()

    def _redis_url(self) -> str:
        """Redis as the next process is to reach it: each through a proxy of its own."""
        if self._thread is None:
            return self.redis.address
        proxy = Proxy(self._thread, self.redis.spec.port)
        self.proxies["redis"].append(proxy)
        return self.redis.address.replace(f":{self.redis.spec.port}/", f":{proxy.port}/")

    def add_gateway(self) -> Process:
        """One more, not started yet."""
        port = free_port()
        environ = {
            "OPENLORA_PORT": str(port),
            "OPENLORA_KAFKA": self.broker.address,
            "OPENLORA_REDIS": self._redis_url(),
            "OPENLORA_STORE": str(self.folder / "store"),
            "OPENLORA_PARTITIONS": str(self.plan.partitions),
            "OPENLORA_LOG_LEVEL": "info",
            **self.plan.gateway_environ,
        }
        name = f"gateway-{len(self.gateways)}"
        gateway = Process(name, ["gateway"], environ, self.folder / f"{name}.log")
        self.gateways.append(gateway)
        if self._thread is not None:
            proxy = Proxy(self._thread, port)
            self.proxies["client"].append(proxy)
        self._ports.append(port)
        return gateway

    def add_worker(self) -> Process:
        """One more, not started yet."""
        argv = ["workers", "--engine", self.plan.engine, "--log-level", "info"]
        argv += ["--drain-timeout-s", "30", *self.plan.worker_flags]
        environ = {
            "OPENLORA_MODEL": str(self.model),
            "OPENLORA_KAFKA": self.broker.address,
            "OPENLORA_REDIS": self._redis_url(),
            "OPENLORA_STORE": str(self.folder / "store"),
            "OPENLORA_DEVICE": "cpu",
            "OPENLORA_DTYPE": "float32",
        }
        name = f"worker-{len(self.workers)}"
        worker = Process(name, argv, environ, self.folder / f"{name}.log")
        self.workers.append(worker)
        return worker

    def urls(self) -> list[str]:
        """HTTP addresses of the gateways whose process lives, as clients reach them."""
        clients = self.proxies["client"]
        return [
            f"http://127.0.0.1:{clients[i].port if clients else self._ports[i]}"
            for i, gateway in enumerate(self.gateways)
            if gateway.running
        ]

    def wait_ready(self) -> None:
        """Until all gateways and workers that live are ready, and own all partitions.

        Raises:
            SetupError: that took too long, with the end of each log.
        """

        def all_ready() -> bool:
            lively = sum(worker.running for worker in self.workers)
            urls = self.urls()
            return bool(urls) and all(self._ready_workers(url) >= lively for url in urls)

        self.wait_until(all_ready, READY_TIMEOUT_S)

    def _ready_workers(self, url: str) -> int:
        pids = {worker.pid for worker in self.workers if worker.running}
        try:
            ready = httpx.get(f"{url}/readyz", timeout=5).status_code == 200
            workers = httpx.get(f"{url}/v1/workers", timeout=5).json()
        except (httpx.HTTPError, ValueError):
            return -1
        if not ready or not isinstance(workers, list):
            return -1
        living = [worker for worker in workers if worker["pid"] in pids]
        owned = {part["partition"] for worker in living for part in worker["partitions"]}
        if len(owned) < self.plan.partitions:
            return -1  # what is asked now might wait for the end of a rebalance
        return sum(worker["ready"] for worker in living)

    def wait_until(self, is_true: Callable[[], bool], timeout_s: float) -> None:
        """Poll until it is. Raises SetupError with the logs where it does not become so."""
        deadline = time.monotonic() + timeout_s
        while not is_true():
            if time.monotonic() > deadline:
                raise SetupError(f"waited {timeout_s:g} s in vain\n{self.last_lines()}")
            time.sleep(_POLL_S)

    def last_lines(self, count: int = 15) -> str:
        """The end of every log."""
        return "\n".join(
            f"--- {process.name}\n" + "\n".join(process.log_text().splitlines()[-count:])
            for process in (*self.gateways, *self.workers)
            if process.log_path.exists()
        )

    def command(self, *words: str) -> str:
        """What an ``openlora`` command says that talks to one of the gateways."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "openlora", *words, "--url", self.urls()[0]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def lose_redis_data(self) -> None:
        """Kill Redis and delete what it kept on disk; it is not started again here."""
        self.redis.kill()
        for path in (self.folder / "redis").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix != ".log":
                path.unlink()

    def stop(self) -> None:
        """End everything that this started."""
        for process in (*self.gateways, *self.workers):
            process.signal(signal.SIGKILL)
            process.end(timeout_s=1)
        if self._owns_broker:
            self.broker.stop()
        self.redis.stop()
        if self._thread is not None:
            self._thread.close()
