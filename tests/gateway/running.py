"""A real gateway process for tests, and a scripted worker that writes tokens into job logs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from openlora.joblog import JobLog, redis_client
from openlora.local import free_port
from openlora.protocol.events import Chunk, End, Token
from openlora.protocol.jobs import Job
from openlora.protocol.names import JOB_TOPICS, open_jobs_key, shard_of
from openlora.protocol.status import Heartbeat

READY_TIMEOUT_S = 30.0


@dataclass
class RunningGateway:
    """A gateway process that answers on ``url``."""

    process: subprocess.Popen[bytes]
    port: int
    log_path: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/ws"

    def log_text(self) -> str:
        return self.log_path.read_text()


@contextmanager
def running_gateway(
    kafka: str, redis_url: str, directory: Path, **environ: str
) -> Iterator[RunningGateway]:
    """Starts `python -m gateway`, waits until it answers, and ends it by SIGTERM."""
    port = free_port()
    log_path = directory / f"gateway-{port}.log"
    settings = {
        "OPENLORA_PORT": str(port),
        "OPENLORA_KAFKA": kafka,
        "OPENLORA_REDIS": redis_url,
        "OPENLORA_STORE": str(directory / "store"),
        "OPENLORA_PARTITIONS": "4",
        "OPENLORA_DRAIN_TIMEOUT_S": "2",
        "OPENLORA_LOG_LEVEL": "info",
    } | environ
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway"],
            env={**os.environ, **settings},
            stdout=log_file,
            stderr=subprocess.STDOUT,
        )
    gateway = RunningGateway(process, port, log_path)
    try:
        _wait_until_up(gateway)
        yield gateway
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(gateway: RunningGateway) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if gateway.process.poll() is not None:
            break
        try:
            httpx.get(f"{gateway.url}/healthz", timeout=1)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the gateway did not come up:\n{gateway.log_text()}")


Script = Callable[[Job], list[tuple[str, ...]]]


def echo_script(job: Job) -> list[str]:
    """Answers with the words of the last message, or of the prompt."""
    text = job.prompt if job.prompt is not None else (job.messages or ())[-1].content
    words = text.split(" ")
    return [word if i == 0 else " " + word for i, word in enumerate(words)]


class ScriptedWorker:
    """Claims every open job it finds in Redis and answers it with ``script``'s texts.

    A token takes ``token_s``; a cancel, or a lease that ran out, ends the job as a worker would.
    It is a thread of the test, with a heartbeat, and speaks to Redis through ``JobLog`` alone.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        script: Callable[[Job], list[str]] = echo_script,
        token_s: float = 0.0,
        hidden_size: int = 64,
    ) -> None:
        self._client = redis_client(redis_url)
        self.log = JobLog(self._client)
        self.script = script
        self.token_s = token_s
        self.jobs: list[Job] = []
        self._hidden_size = hidden_size
        self._running: dict[str, tuple[Job, int, list[str], int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-worker")

    def __enter__(self) -> ScriptedWorker:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()

    def beat(self) -> None:
        """Writes a heartbeat of a ready worker."""
        now_ms = time.time_ns() // 1_000_000
        self.log.write_heartbeat(
            Heartbeat(
                id="scripted-0",
                pid=os.getpid(),
                engine_pid=os.getpid(),
                host="test",
                device="cpu",
                dtype="float32",
                model="/models/tiny",
                model_id="tiny",
                max_model_len=512,
                ready=True,
                started_ms=now_ms,
                written_ms=now_ms,
                hidden_size=self._hidden_size,
            )
        )

    def _run(self) -> None:
        last_beat = time.monotonic()
        while not self._stop.is_set():
            if time.monotonic() - last_beat > 1:
                self.beat()
                last_beat = time.monotonic()
            self._claim_new()
            self._step()
            self._stop.wait(max(self.token_s, 0.002))

    def _claim_new(self) -> None:
        # what a worker gets from Kafka, taken from the log's own list of open jobs
        keys = self._client.keys(open_jobs_key(0).replace("{00}", "{*}"))
        for key in keys:
            for raw in self._client.zrange(key, 0, -1):
                job_id = raw.decode()
                if job_id not in self._running:
                    self._claim(job_id)

    def _claim(self, job_id: str) -> None:
        stored = self._client.hget(f"openlora:{{{job_id[:2]}}}:job:{job_id}", "job")
        if stored is None:
            return
        from openlora.protocol.codec import decode_job

        job = decode_job(stored)
        claim = self.log.claim([job_id], "scripted-0")[0]
        if claim.status == "claimed":
            done = sum(len(chunk.tokens) for chunk in claim.chunks)
            self.jobs.append(job)
            self._running[job_id] = (job, claim.epoch, self.script(job), done)

    def _step(self) -> None:
        chunks = []
        for job_id, (job, epoch, texts, index) in self._running.items():
            last = index + 1 >= len(texts)
            end = None
            if last:
                end = End("stop", prompt_tokens=3, completion_tokens=len(texts), ttft_ms=5.0)
            chunks.append(Chunk(job_id, epoch, index, (Token(index, texts[index]),), end))
            self._running[job_id] = (job, epoch, texts, index + 1)
        for chunk, result in zip(chunks, self.log.append(chunks), strict=True):
            if chunk.end is not None or result.status in ("fenced", "gone"):
                del self._running[chunk.job_id]
            elif result.cancelled:
                del self._running[chunk.job_id]
                end = End("cancelled", prompt_tokens=3, completion_tokens=chunk.first_index + 1)
                self.log.append([Chunk(chunk.job_id, chunk.epoch, chunk.first_index + 1, end=end)])


__all__ = ["JOB_TOPICS", "RunningGateway", "ScriptedWorker", "running_gateway", "shard_of"]
