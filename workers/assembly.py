"""The parts of a worker's I/O process, and how they are joined."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from openlora.adapters.stores import open_store
from openlora.joblog import JobLog, redis_client
from openlora.joblog.crashes import CrashLog
from openlora.protocol.bulk import BulkMessage
from workers.adapter_tokenizers import AdapterTokenizers
from workers.admission import Admission
from workers.backlog import Fetched
from workers.budgets import Budgets
from workers.bulk import BulkLane
from workers.bulk_opening import BundleOpener, HeldAgainst
from workers.bulk_outlet import BulkOutlet
from workers.config import WorkerConfig
from workers.consumer import JobConsumer
from workers.dead_letters import DeadLetters
from workers.engine_client import EngineClient
from workers.loop import WorkerLoop
from workers.messages import ModelFacts
from workers.reading import Reader
from workers.token_sink import TokenSink
from workers.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True)
class Parts:
    """What works together in one I/O process; nothing of it has started yet."""

    config: WorkerConfig
    engine: EngineClient
    job_log: JobLog
    crash_log: CrashLog
    sink: TokenSink
    consumer: JobConsumer
    loop: WorkerLoop
    dead_letters: DeadLetters
    bulk: BulkLane

    def admission(self, tokenizer: PromptTokenizer, facts: ModelFacts) -> Admission:
        """How messages become runs, once model and tokenizer are loaded."""

        def end_position(fetched: Fetched, job_id: str | None) -> None:
            self.consumer.end(fetched.position, job_id)

        # One for jobs and lines: what an adapter's tokenizer takes to read is spent once.
        tokenizers = AdapterTokenizers(tokenizer)
        wake = self.loop.wake
        self.bulk.prepare(tokenizer, facts, tokenizers, Reader(facts.max_model_len, wake))
        return Admission(
            worker_id=self.config.worker_id,
            job_log=self.job_log,
            sink=self.sink,
            engine=self.engine,
            facts=facts,
            tokenizers=tokenizers,
            adapters=open_store(self.config.store, self.config.adapter_cache),
            dead_letters=self.dead_letters,
            crash_log=self.crash_log,
            end_position=end_position,
            next_ticket=self.loop.next_ticket,
            reader=Reader(facts.max_model_len, wake),
        )


def assemble(
    config: WorkerConfig,
    engine: EngineClient,
    job_log: JobLog,
    crash_log: CrashLog,
    stop_now: threading.Event,
    *,
    on_consumer_failure: Callable[[str], None],
) -> Parts:
    """Join the parts; nothing connects or starts here.

    ``stop_now``: when set, nobody waits for Redis any longer. ``on_consumer_failure`` is called in
    the consumer's thread.
    """

    def on_dead_letter_written(fetched: Fetched) -> None:
        consumer.end(fetched.position, None)

    # The consumer delivers to the loop and the loop tells the consumer what has ended.
    consumer = JobConsumer(
        config.kafka,
        config.worker_id,
        Budgets(config.interactive_budget, config.batch_budget),
        deliver=lambda batch: loop.deliver(batch),
        retire=lambda job_ids: loop.retire(job_ids),
        on_failure=on_consumer_failure,
    )
    sink = TokenSink(job_log, config.worker_id, stop_now)
    loop = WorkerLoop(engine, sink, consumer, job_log.retire)
    dead_letters = DeadLetters(config.kafka, config.worker_id, on_dead_letter_written)
    bulk = BulkLane(
        engine,
        BundleOpener(
            worker_id=config.worker_id,
            engine=engine,
            adapters=open_store(config.store, config.adapter_cache),
            dead_letters=dead_letters,
            end_position=lambda position: consumer.end(position, None),
            held_against=lambda message: sink.patiently(lambda: _held_against(crash_log, message)),
            brings_tokens=lambda path: bulk.brings_tokens(path),
        ),
        BulkOutlet(config.kafka, redis_client(config.redis)),
        budget=config.batch_budget,
        owns=consumer.owns,
        next_ticket=loop.next_ticket,
        others_inside=lambda: bool(loop.runs_in_engine()),
    )
    loop.set_bulk(bulk)
    return Parts(config, engine, job_log, crash_log, sink, consumer, loop, dead_letters, bulk)


def _held_against(crash_log: CrashLog, message: BulkMessage) -> HeldAgainst:
    suspicions = crash_log.lines_suspected(message.batch_id, [line.line for line in message.lines])
    return suspicions, crash_log.quarantined([a.hash for a in message.group.adapters])
