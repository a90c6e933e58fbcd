"""A bulk lane by itself: the engine and Kafka are lists here."""

from __future__ import annotations

import itertools

from openlora.adapters.store import AdapterStore
from openlora.protocol.bulk import (
    BulkGroup,
    BulkLine,
    BulkMessage,
    LineParams,
    decode_bulk_answers,
)
from openlora.protocol.codec import encode
from openlora.protocol.dead import decode_dead_letter
from workers.adapter_tokenizers import AdapterTokenizers
from workers.backlog import Fetched
from workers.bulk import BulkLane
from workers.bulk_opening import BundleOpener
from workers.messages import ModelFacts, Output, StepOutputs
from workers.offsets import Position
from workers.reading import Reader

FACTS = ModelFacts(1, "cpu", "f32", 200, 32_768, (0,), 0, 0, "none", max_num_seqs=16)
SOON = 1 << 60


class Engine:
    """Keeps what it is told; ``registered`` as workers do it."""

    def __init__(self) -> None:
        self.started = {}
        self.aborted = []
        self.registered = []

    def register(self, name, path):
        self.registered.append(name)

    def start(self, start):
        self.started[start.ticket] = start

    def abort(self, ticket):
        self.aborted.append(ticket)


class Outlet:
    """Holds answers until ``acknowledge``."""

    def __init__(self) -> None:
        self.stopped = frozenset()
        self.watched = frozenset()
        self.messages = []
        self.letters = []
        self.waiting = []

    def start(self):
        pass

    def write(self, messages, letters, on_written):
        self.letters += [decode_dead_letter(letter) for letter in letters]
        self.messages += [decode_bulk_answers(message) for message in messages]
        self.waiting.append(on_written)

    def acknowledge(self):
        for on_written in self.waiting:
            on_written()
        self.waiting.clear()


class Letters:
    def __init__(self) -> None:
        self.codes = []

    def write(self, fetched, code, reason):
        self.codes.append(code)


class Bench:
    def __init__(self, tokenizer, store, budget=256) -> None:
        self.engine, self.outlet, self.letters = Engine(), Outlet(), Letters()
        self.ended = []
        self.owned = True
        self.suspicions, self.quarantined = {}, {}
        self.others_inside = False
        opener = BundleOpener(
            worker_id="w",
            engine=self.engine,
            adapters=AdapterStore(store),
            dead_letters=self.letters,
            end_position=self.ended.append,
            held_against=lambda message: (self.suspicions, self.quarantined),
        )
        self.lane = BulkLane(
            self.engine,
            opener,
            self.outlet,
            budget=budget,
            owns=lambda position: self.owned,
            next_ticket=itertools.count().__next__,
            others_inside=lambda: self.others_inside,
        )
        reader = Reader(FACTS.max_model_len, lambda: None)
        self.lane.prepare(tokenizer, FACTS, AdapterTokenizers(tokenizer), reader)

    def deliver(self, value, offset=0):
        position = Position(("openlora.batch", 0), offset, 1)
        fetched = Fetched(position, None, value if isinstance(value, bytes) else encode(value))
        self.lane.deliver([fetched])
        return position

    def say(self, ticket, token=500, **fields):
        self.lane.take([StepOutputs((Output(ticket, 0, token, **fields),))])

    def upkeep(self):
        self.lane._upkeep_due = 0.0
        self.lane.refill(0)

    @property
    def answers(self):
        return [answer for bundle in self.outlet.messages for answer in bundle.answers]


def bundle(*lines, adapters=(), batch_id="batch_1", deadline_ms=SOON):
    return BulkMessage(batch_id, "hash", deadline_ms, BulkGroup("plain", "", adapters), lines)


def line(number, prompt="hello", **params):
    return BulkLine(number, f"c{number}", prompt=prompt, params=LineParams(**params))
