"""One producer process: Celery's worker, and beside it the steward and the collector.

Start: Redis and Kafka are reached and the topics made, then the threads, then Celery takes tasks.
Stop (SIGTERM, SIGINT): Celery ends the tasks that run and takes no more; then the collector writes
and commits what it holds. Killed instead, the next process goes on from Redis and the store.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from openlora.errors import SetupError
from openlora.joblog import reach_redis, redis_client
from producer.bulk.adapters_known import KnownAdapters
from producer.bulk.app import add_tasks, make_app, queue_step
from producer.bulk.collector import Collector
from producer.bulk.config import ProducerConfig
from producer.bulk.files import FileStore
from producer.bulk.sender import BundleSender
from producer.bulk.state import BatchStates
from producer.bulk.steps import Tools
from producer.bulk.steward import Steward
from producer.topics import ensure_topics

CONNECT_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0

logger = logging.getLogger("producer.main")


def run(config: ProducerConfig) -> int:
    """Work until a signal; the exit status. Raises SetupError when it cannot start."""
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    if logging.getLogger().level > logging.INFO:
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
    client = redis_client(config.redis)
    reach_redis(client, CONNECT_TIMEOUT_S)
    ensure_topics(config.kafka, config.partitions)
    _check_folder(config)
    states = BatchStates(client, config.keep_batches_s)
    store = FileStore(config.batches, client)
    sender = BundleSender(config.kafka)
    app = make_app(config.redis)
    steward = Steward(states, client, lambda batch_id, step: queue_step(app, batch_id, step))
    add_tasks(app, Tools(states, store, KnownAdapters(client), sender, client), steward)
    threads = _Threads()
    threads.start("collector", Collector(config.kafka, states, store).run)
    threads.start("steward", steward.run)
    worker = app.Worker(
        pool="threads",
        concurrency=config.concurrency,
        hostname=f"producer@{socket.gethostname()}-{os.getpid()}",
        loglevel=config.log_level.upper(),
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    threads.stop()
    sender.close()
    client.close()
    return 1 if threads.failed else int(worker.exitcode or 0)


class _Threads:
    """The threads beside Celery. One that fails ends the process: it is started anew."""

    def __init__(self) -> None:
        self.failed = False
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, name: str, work: Callable[[threading.Event], None]) -> None:
        thread = threading.Thread(target=self._run, args=(name, work), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_S)

    def _run(self, name: str, work: Callable[[threading.Event], None]) -> None:
        try:
            work(self._stopping)
        except SetupError as error:
            logger.error("event=%s_failed reason=%r next=exit", name, error.message)
            self._fail()
        except Exception:
            logger.exception("event=%s_failed next=exit", name)
            self._fail()

    def _fail(self) -> None:
        self.failed = True
        os.kill(os.getpid(), signal.SIGTERM)


def _check_folder(config: ProducerConfig) -> None:
    try:
        config.batches.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"the folder of batch files, {config.batches}, cannot be made ({error.strerror}); "
            "set --batches or OPENLORA_BATCHES"
        ) from error
