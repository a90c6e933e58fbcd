"""How a worker starts and stops, in this order and for these reasons.

Start
    1. engine process    first, because loading the model takes longest
    2. Redis, Kafka      reached meanwhile; if one is not there, that is said within seconds
    3. tokenizer         loaded meanwhile, in a thread; heartbeats show how far the model is
    4. engine ready      waited for before the group is joined: nobody gives us partitions that we
                         could not serve
    5. group             joined once it is at rest; jobs come in; the first heartbeat as a member
                         says "ready"

Drain (SIGTERM or SIGINT)
    1. group             left first, with what has ended committed: others take over our
                         partitions, and the jobs waiting there, at once
    2. inbox             dropped; these jobs were not claimed, their next owner takes them
    3. runs              go on to their end. One that another worker claims meanwhile is fenced
                         and dropped here: its stream stalls by one prefill. Ends that can no
                         longer be committed are harmless: the next claim says "ended"
    4. engine process    stopped when nothing runs or the drain timeout is over; runs that are
                         left are continued elsewhere from their log
    5. heartbeat         removed last: until then this worker is seen to drain

A second signal skips to 4 at once. If the engine process dies, its jobs are handed over and the
group is left at once (aftermath.py), so that they move without waiting for the session timeout;
the exit status is 1: whether to start again is for the supervisor. If Kafka's thread fails, the
runs are drained and the status is 1.
"""

from __future__ import annotations

import gc
import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from openlora.adapters.stores import cache_of, is_url, open_store
from openlora.joblog import JobLog, reach_redis, redis_client
from openlora.joblog.crashes import CrashLog
from workers.aftermath import Aftermath
from workers.assembly import Parts, assemble
from workers.config import MERGES, WorkerConfig
from workers.engine_client import EngineClient, EngineGone
from workers.heartbeat import (
    HEARTBEAT_INTERVAL_S,
    Heartbeats,
    HeartbeatWriter,
    LoadingHeartbeats,
)
from workers.hint_watch import HintWatch
from workers.messages import EngineSetup
from workers.pins import PinWatch
from workers.run import now_ms
from workers.settling import LOOK_INTERVAL_S, PATIENCE_S, is_settled
from workers.token_sink import Stopped
from workers.tokenizer import PromptTokenizer

CONNECT_TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 8.0
DEAD_LETTERS_TIMEOUT_S = 2.0
GC_THRESHOLDS = (20_000, 20, 50)
"""A run's tokens make no cycles; looking for some every 700 allocations took 3 % of the time."""

logger = logging.getLogger("workers.lifecycle")


class Worker:
    """One worker, from start to exit status. ``run`` belongs to the main thread."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._draining = threading.Event()
        self._stop_now = threading.Event()
        self._failure: str | None = None
        self._started = False
        self._wake: Callable[[], None] = lambda: None

    def run(self) -> int:
        """Work until a signal; the exit status. Raises SetupError when it cannot start."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            return self._run()
        except Stopped:
            logger.warning("event=stopped_at_once next=other_workers_continue")
            return 1 if self._started else 0  # before the start is through there is nothing to lose

    def _run(self) -> int:
        config = self._config
        logger.info("event=start worker=%s model=%s next=engine", config.worker_id, config.model)
        engine = EngineClient(
            EngineSetup(
                kind=config.engine,
                model=config.model,
                device=config.device,
                dtype=config.dtype,
                log_level=config.log_level.upper(),
                attention_backend=config.attention_backend,
                deterministic=config.deterministic,
                max_graph_tokens=config.max_graph_tokens,
                **_store_settings(config),
            )
        )
        try:
            return self._run_with(engine)
        finally:
            if self._stop_now.is_set():
                engine.kill()
            else:
                engine.stop()
            logger.info("event=engine_stopped")

    def _run_with(self, engine: EngineClient) -> int:
        client = redis_client(self._config.redis)
        reach_redis(client, CONNECT_TIMEOUT_S)
        logger.info("event=redis_reached next=kafka")
        parts = assemble(
            self._config,
            engine,
            JobLog(client, self._config.keep_ended_s),
            CrashLog(client),
            self._stop_now,
            on_consumer_failure=self._on_consumer_failure,
        )
        parts.consumer.connect(int(CONNECT_TIMEOUT_S * 1000))
        logger.info("event=kafka_reached next=tokenizer")
        loading_tokenizer = _load_tokenizer(self._config.model)
        facts = engine.wait_ready(LoadingHeartbeats(self._config, engine.pid, parts.job_log))
        logger.info("event=engine_ready pid=%d device=%s next=tokenizer", facts.pid, facts.device)
        tokenizer = loading_tokenizer.result()
        logger.info("event=tokenizer_loaded next=join_group")
        parts.loop.set_admission(parts.admission(tokenizer, facts))
        heartbeats = Heartbeats(HeartbeatWriter(self._config, facts), parts)
        self._wake = parts.loop.wake
        self._settle(parts, heartbeats)
        self._started = True
        # What is loaded stays: a collection that looks at it would hold up every stream.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        parts.consumer.start()
        pins = PinWatch(
            redis_client(self._config.redis),
            open_store(self._config.store, self._config.adapter_cache),
            engine,
            parts.loop.wake,
        )
        pins.start()
        hints = HintWatch(redis_client(self._config.redis), parts.consumer.attention)
        hints.start()
        try:
            self._work(parts, heartbeats, pins)
            self._drain(parts, heartbeats)
        except EngineGone as error:
            logger.error("event=engine_died status=%s next=leave_group_and_exit", error.status)
            self._failure = str(error)
            Aftermath(parts, client).run(error.status, pins.under_way())
        finally:
            pins.stop()
            hints.stop()
            self._leave(parts, heartbeats)
            client.close()
        return 1 if self._failure else 0

    def _settle(self, parts: Parts, heartbeats: Heartbeats) -> None:
        """Wait until the group is at rest; a signal ends this as it ends the rest of the start."""
        deadline = time.monotonic() + PATIENCE_S
        partitions = parts.consumer.partition_count()
        while time.monotonic() < deadline:
            others = parts.sink.patiently(parts.job_log.heartbeats)
            if is_settled(others, partitions, now_ms()):
                return
            logger.info("event=group_in_motion next=wait_to_join")
            heartbeats.write_if_due(ready=False)
            time.sleep(LOOK_INTERVAL_S)

    def _work(self, parts: Parts, heartbeats: Heartbeats, pins: PinWatch) -> None:
        while not self._draining.is_set():
            heartbeats.write_if_due(ready=True)
            pins.apply(parts.loop.load.resident_adapters)
            parts.loop.turn(HEARTBEAT_INTERVAL_S)

    def _drain(self, parts: Parts, heartbeats: Heartbeats) -> None:
        loop = parts.loop
        parts.consumer.begin_leave()
        loop.drop_inbox()
        deadline = time.monotonic() + self._config.drain_timeout_s
        logger.info(
            "event=drain runs=%d timeout_s=%s next=finish_runs",
            *(loop.open_runs, self._config.drain_timeout_s),
        )
        while loop.open_runs and time.monotonic() < deadline and not self._stop_now.is_set():
            heartbeats.write_if_due(ready=False)
            loop.turn(min(HEARTBEAT_INTERVAL_S, max(0.0, deadline - time.monotonic())))
            loop.drop_inbox()
        if loop.open_runs:
            logger.warning(
                "event=drain_ended runs_left=%d next=other_workers_continue", loop.open_runs
            )

    def _leave(self, parts: Parts, heartbeats: Heartbeats) -> None:
        at_once = self._stop_now.is_set()
        parts.consumer.begin_leave()
        left = parts.consumer.wait_left(0 if at_once else LEAVE_TIMEOUT_S)
        logger.info("event=group_left clean=%s next=remove_heartbeat", left)
        parts.dead_letters.close(0 if at_once else DEAD_LETTERS_TIMEOUT_S)
        parts.bulk.outlet.close(0 if at_once else DEAD_LETTERS_TIMEOUT_S)
        heartbeats.remove()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """First: drain. Second, or before the start is through: stop at once."""
        if self._draining.is_set() or not self._started:
            self._stop_now.set()
        self._draining.set()
        self._wake()
        if not self._started:
            raise Stopped

    def _on_consumer_failure(self, reason: str) -> None:
        self._failure = reason
        logger.error("event=consumer_failed reason=%r next=drain_and_exit", reason)
        self._draining.set()
        self._wake()


def _store_settings(config: WorkerConfig) -> dict[str, Any]:
    """Where the engine finds adapters and keeps merged ones."""
    store = config.store
    if not is_url(store):
        return {"merge_dir": str(Path(store) / MERGES)}
    cache = cache_of(store, config.adapter_cache)
    return {
        "merge_dir": str(cache / MERGES),
        "adapter_store": str(store),
        "adapter_disk_dir": str(cache),
        "adapter_disk_bytes": config.adapter_cache_bytes,
    }


def _load_tokenizer(model: str) -> Future[PromptTokenizer]:
    """Load it beside the engine: seconds of imports that the main thread would not watch in."""
    pool = ThreadPoolExecutor(1, "tokenizer")
    loading = pool.submit(PromptTokenizer, model)
    pool.shutdown(wait=False)
    return loading
