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
from openlora.protocol.codec import decode_job
from openlora.protocol.events import Chunk, End, Token
from openlora.protocol.jobs import Job
from openlora.protocol.names import job_key
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
    port = int(environ.get("OPENLORA_PORT") or free_port())
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


def echo_script(job: Job) -> list[str]:
    """Answers with the words of the last message, or of the prompt."""
    text = job.prompt if job.prompt is not None else (job.messages or ())[-1].content
    words = text.split(" ")
    return [word if i == 0 else " " + word for i, word in enumerate(words)]


@dataclass
class ScriptedJob:
    """One job that the scripted worker is at."""

    job: Job
    epoch: int
    texts: list[str]
    index: int


class ScriptedWorker:
    """Claims every open job it finds in Redis and answers it with ``script``'s texts.

    Every ``token_s`` each job gets ``tokens_per_chunk`` tokens; a cancel, or a lease that ran out,
    ends the job as a worker would. It is a thread of the test, has a heartbeat, and speaks to Redis
    through ``JobLog``; only the jobs, which a worker gets from Kafka, it takes from the log's list.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        script: Callable[[Job], list[str]] = echo_script,
        token_s: float = 0.0,
        tokens_per_chunk: int = 1,
        hidden_size: int = 64,
    ) -> None:
        self._client = redis_client(redis_url)
        self.log = JobLog(self._client)
        self.jobs: list[Job] = []
        self.running: dict[str, ScriptedJob] = {}
        self.resident_adapters: tuple[str, ...] = ()
        self._script = script
        self._token_s = token_s
        self._tokens_per_chunk = tokens_per_chunk
        self._hidden_size = hidden_size
        self._stop = threading.Event()
        self._may_run = threading.Event()
        self._may_run.set()
        self._thread = threading.Thread(target=self._run, name="scripted-worker")

    def __enter__(self) -> ScriptedWorker:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._may_run.set()
        self._thread.join()
        # what is left would be taken up by the next test's worker
        for job_id, work in self.running.items():
            self.log.append([Chunk(job_id, work.epoch, work.index, end=End("cancelled"))])
        self.log.remove_heartbeat("scripted-0")
        self._client.close()

    def pause(self) -> None:
        """No claims and no tokens until ``resume``."""
        self._may_run.clear()

    def resume(self) -> None:
        """Goes on."""
        self._may_run.set()

    def _beat(self) -> None:
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
                resident_adapters=self.resident_adapters,
            )
        )

    def _run(self) -> None:
        last_beat = time.monotonic()
        while not self._stop.is_set():
            self._may_run.wait()
            if time.monotonic() - last_beat > 1:
                self._beat()
                last_beat = time.monotonic()
            self._claim_new()
            self._step()
            self._stop.wait(max(self._token_s, 0.002))

    def _claim_new(self) -> None:
        for key in self._client.keys("openlora:{*}:open"):
            for raw in self._client.zrange(key, 0, -1):
                if raw.decode() not in self.running:
                    self._claim(raw.decode())

    def _claim(self, job_id: str) -> None:
        stored, published = self._client.hmget(job_key(job_id), "job", "published")
        if stored is None or published is None:
            return  # not on the topic: it may be a repeated request, about to be discarded
        job = decode_job(stored)
        claim = self.log.claim([job_id], "scripted-0")[0]
        if claim.status == "claimed":
            done = sum(len(chunk.tokens) for chunk in claim.chunks)
            self.jobs.append(job)
            self.running[job_id] = ScriptedJob(job, claim.epoch, self._script(job), done)

    def _step(self) -> None:
        chunks = [self._next_chunk(job_id, work) for job_id, work in self.running.items()]
        for chunk, result in zip(chunks, self.log.append(chunks), strict=True):
            if chunk.end is not None or result.status in ("fenced", "gone"):
                del self.running[chunk.job_id]
            elif result.cancelled:
                del self.running[chunk.job_id]
                index = chunk.first_index + len(chunk.tokens)
                end = End("cancelled", prompt_tokens=3, completion_tokens=index)
                self.log.append([Chunk(chunk.job_id, chunk.epoch, index, end=end)])

    def _next_chunk(self, job_id: str, work: ScriptedJob) -> Chunk:
        first = work.index
        work.index = min(first + self._tokens_per_chunk, len(work.texts))
        tokens = tuple(Token(i, work.texts[i]) for i in range(first, work.index))
        end = None
        if work.index == len(work.texts):
            end = End("stop", prompt_tokens=3, completion_tokens=work.index, ttft_ms=5.0)
        return Chunk(job_id, work.epoch, first, tokens, end)
