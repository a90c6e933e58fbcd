"""A real worker process for tests, with a scripted engine, and the jobs that go to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from openlora.bench.pipeline_model import write_tokenizer
from openlora.joblog import JobLog, core, redis_client
from openlora.protocol.codec import decode_heartbeat, encode
from openlora.protocol.events import Chunk, End, Token
from openlora.protocol.jobs import Job
from openlora.protocol.names import (
    JOBS_TOPIC,
    WORKER_GROUP,
    WORKERS_KEY,
    job_key,
    new_job_id,
    worker_key,
)
from openlora.protocol.status import Heartbeat
from openlora.sampling_params import SamplingParams
from producer.topics import TopicKeeper

READY_TIMEOUT_S = 90.0
SHARD = 7


def wait_until(is_true: Callable[[], object], timeout_s: float = 40.0) -> None:
    """Return once ``is_true()`` is; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@dataclass
class Worker:
    """One ``python -m workers``."""

    id: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def log_text(self) -> str:
        return self.log_path.read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)


@dataclass
class System:
    """Broker and Redis with what a test does to them in the gateway's place."""

    kafka: str
    redis_url: str
    directory: Path
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.redis = redis_client(self.redis_url)
        self.log = JobLog(self.redis)
        with TopicKeeper(self.kafka, partitions=4) as keeper:
            keeper.ensure()
        self.producer = KafkaProducer(bootstrap_servers=self.kafka, acks="all")
        self.model = write_tokenizer(self.directory / "model")

    def close(self) -> None:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                worker.process.kill()
            worker.process.wait()
        self.producer.close(timeout=1)
        self.redis.close()

    def start_worker(self, *flags: str, ready: bool = True) -> Worker:
        worker_id = f"worker-{len(self.workers)}"
        log_path = self.directory / f"{worker_id}.log"
        argv = [sys.executable, "-m", "workers", "--worker-id", worker_id, "--log-level", "info"]
        argv += ["--model", str(self.model), "--kafka", self.kafka, "--redis", self.redis_url]
        argv += ["--store", str(self.directory / "store"), "--engine", "scripted:100", *flags]
        with log_path.open("wb") as log:
            process = subprocess.Popen(argv, stderr=log, env=dict(os.environ))
        worker = Worker(worker_id, process, log_path)
        self.workers.append(worker)
        if ready:
            wait_until(lambda: self.is_ready(worker), READY_TIMEOUT_S)
        return worker

    def is_ready(self, worker: Worker) -> bool:
        assert worker.process.poll() is None, worker.log_text()
        heartbeat = self.heartbeat(worker)
        return heartbeat is not None and heartbeat.ready

    def heartbeat(self, worker: Worker) -> Heartbeat | None:
        data = self.redis.get(worker_key(worker.id))
        assert data is None or self.redis.sismember(WORKERS_KEY, worker.id)
        return None if data is None else decode_heartbeat(data)

    def store(self, job: Job, lease_ms: int = 60_000) -> None:
        call = core.store_call(job, lease_ms)
        self.redis.eval(call.script.source, len(call.keys), *call.keys, *call.args)

    def publish(self, value: bytes, partition: int = 0, topic: str = JOBS_TOPIC) -> int:
        return self.producer.send(topic, value, partition=partition).get(10).offset

    def submit(self, job: Job, partition: int = 0, topic: str = JOBS_TOPIC) -> int:
        self.store(job)
        return self.publish(encode(job), partition, topic)

    def cancel(self, job: Job) -> None:
        self.redis.hset(job_key(job.job_id), "cancel", 1)

    def chunks(self, job: Job) -> tuple[Chunk, ...]:
        call = core.read_call(job.job_id)
        reply = self.redis.eval(call.script.source, len(call.keys), *call.keys, *call.args)
        view = core.decode_view(reply, -1)
        return () if view is None else view.chunks

    def tokens(self, job: Job) -> list[Token]:
        """Tokens of the log, whose chunks must follow each other without gap or repeat."""
        tokens: list[Token] = []
        for chunk in self.chunks(job):
            assert chunk.first_index == len(tokens)
            tokens += chunk.tokens
        return tokens

    def end(self, job: Job, timeout_s: float = 40.0) -> End:
        """The job's end, waited for."""
        found: list[End] = []

        def ended() -> bool:
            chunks = self.chunks(job)
            if chunks and chunks[-1].end is not None:
                found.append(chunks[-1].end)
            return bool(found)

        wait_until(ended, timeout_s)
        return found[0]

    def run(self, job: Job, partition: int = 0) -> End:
        self.submit(job, partition)
        return self.end(job)

    def committed(self, partition: int = 0, topic: str = JOBS_TOPIC) -> int:
        admin = KafkaAdminClient(bootstrap_servers=self.kafka)
        try:
            offsets = admin.list_group_offsets(WORKER_GROUP)
        finally:
            admin.close()
        offset = offsets.get(WORKER_GROUP, offsets).get(TopicPartition(topic, partition))
        return -1 if offset is None else offset.offset


@contextmanager
def running_system(kafka: str, redis_url: str, directory: Path) -> Iterator[System]:
    """Topics made, no worker yet; kills what is left at the end."""
    system = System(kafka, redis_url, directory)
    try:
        yield system
    finally:
        system.close()


def a_job(max_tokens: int = 4, **fields: object) -> Job:
    params = SamplingParams(max_tokens=max_tokens, seed=1, **fields.pop("params", {}))  # type: ignore[arg-type]
    defaults = {"tenant": "t", "created_ms": int(time.time() * 1000), "prompt": "hello"}
    return Job(job_id=new_job_id(SHARD), params=params, **(defaults | fields))  # type: ignore[arg-type]


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
