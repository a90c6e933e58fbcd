"""A producer whose steps a test does one by one, in its own process, on a real Redis."""

from __future__ import annotations

import io
import json
import secrets

from openlora.errors import Overloaded
from openlora.joblog import redis_client
from openlora.protocol.bulk import BulkAnswer, BulkAnswers, decode_bulk_message
from openlora.registry import AdapterRegistry
from producer.bulk.adapters_known import KnownAdapters
from producer.bulk.app import do_step
from producer.bulk.files import FileStore
from producer.bulk.records import BatchRecord
from producer.bulk.results import answered, write_segment
from producer.bulk.state import BatchStates, Mark, now_ms
from producer.bulk.steps import Tools
from producer.bulk.steward import Steward


class Sender:
    """Keeps what is sent, or refuses it."""

    def __init__(self) -> None:
        self.bundles = []
        self.is_away = False

    def send(self, bundles):
        if self.is_away:
            raise Overloaded("no broker")
        self.bundles += [(key, decode_bulk_message(value)) for key, value in bundles]


class Producer:
    """The steward's queue is a list; ``run`` does all steps until there is none."""

    def __init__(self, redis_url, folder) -> None:
        self.client = redis_client(redis_url)
        self.states = BatchStates(self.client)
        self.store = FileStore(folder, self.client)
        self.sender = Sender()
        self.registry = AdapterRegistry(self.client)
        adapters = KnownAdapters(self.client)
        self.tools = Tools(self.states, self.store, adapters, self.sender, self.client)
        self.queue = []
        self.steward = Steward(self.states, self.client, lambda *entry: self.queue.append(entry))
        self.fails = []

    def submit(self, data, **fields):
        file = self.store.put(io.BytesIO(data), "t", "in.jsonl", "batch")
        path = self.store.path(file)
        record = BatchRecord(
            "batch_" + secrets.token_hex(4),
            "t",
            file.id,
            file.sha256,
            file.size,
            path.stat().st_mtime_ns,
            now_ms(),
            now_ms() + 1_000_000,
            **fields,
        )
        assert self.states.create(record, 100)
        self.steward.advance(record.id)
        return record.id

    def run(self, times=1):
        while self.queue:
            batch_id, step = self.queue.pop(0)
            for _ in range(times):
                do_step(self.tools, self.steward, batch_id, step)

    def answer(self, batch_id, bundles, partition=0):
        """What collector and worker do for these bundles."""
        for _, message in bundles:
            answers = tuple(
                BulkAnswer(line.line, line.custom_id, f"to {line.prompt}", "stop", 2, 3)
                for line in message.lines
            )
            bundle = BulkAnswers(batch_id, message.input_hash, message.group, answers)
            results = answered(bundle, 1)
            name = f"answers-{partition}-{message.lines[0].line}"
            write_segment(self.store.folder(batch_id).segments, name, results)
            marks = [Mark(answer.line, 2, 3) for answer in answers]
            self.states.mark(batch_id, marks, source="worker", adapter="a")

    def results(self, batch_id):
        return [json.loads(line) for line in b"".join(self.store.results(batch_id)).splitlines()]


def lines(count, **fields):
    return b"".join(
        json.dumps({"prompt": f"p{n}", "adapter": "ab"[n % 2], **fields}).encode() + b"\n"
        for n in range(count)
    )
