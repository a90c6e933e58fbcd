"""One system and its undisturbed run, for all tests that mend what they break."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from openlora.bench.chaos_faults import Fault
from openlora.bench.chaos_report import FaultRow, fault_row, record_answers
from openlora.bench.chaos_streams import Answer, Ask, Clients, Stream, asks
from openlora.bench.chaos_system import ChaosPlan, ChaosSystem
from openlora.local import ServerProcess

STREAMS = 64
TOKENS = 120
SEED = 5
PATIENCE_S = 90.0


@dataclass
class Storm:
    """A system, clients at it, and what they were answered before anything broke."""

    system: ChaosSystem
    clients: Clients
    asks: list[Ask]
    answers: Mapping[str, Answer]

    def begin(self, count: int = STREAMS) -> list[Stream]:
        """Streams that have all begun to speak, and go on."""
        while True:
            streams = [self.clients.begin(ask, self.answers[ask.name]) for ask in self.asks[:count]]
            self.system.wait_until(lambda s=streams: all(len(one.token_ids) > 5 for one in s), 60)
            if all(stream.ended_at is None for stream in streams):
                return streams
            # Behind the last fault the group still moved: some began when others had ended.
            self.clients.wait(streams, PATIENCE_S)

    def strike(self, name: str, fault: Fault, count: int = STREAMS) -> FaultRow:
        """Break it in mid-stream, and wait for all streams to end and all parts to be ready."""
        streams = self.begin(count)
        at = time.monotonic()
        fault(self.system, random.Random(SEED))
        self.clients.wait(streams, PATIENCE_S)
        row = fault_row(name, streams, at, time.monotonic())
        self.system.wait_ready()
        return row


@pytest.fixture(scope="session")
def make_storm(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Storm]]:
    """Start a system (``plan``, maybe a broker that runs already) and record its answers."""
    made: list[Storm] = []

    def make(
        plan: ChaosPlan,
        broker: ServerProcess | None = None,
        *,
        streams: int = STREAMS,
        tokens: int = TOKENS,
    ) -> Storm:
        folder: Path = tmp_path_factory.mktemp("storm")
        system = ChaosSystem(folder, plan, broker)
        clients = Clients(system.urls, SEED)
        storm = Storm(system, clients, asks(streams, tokens), {})
        made.append(storm)
        system.start()
        storm.answers = record_answers(clients, storm.asks, tokens)
        return storm

    yield make
    for storm in made:
        storm.clients.close()
        storm.system.stop()


@pytest.fixture(scope="session")
def storm(make_storm: Callable[..., Storm]) -> Storm:
    """Two gateways and two workers with scripted tokens, everything behind proxies."""
    return make_storm(ChaosPlan(engine="scripted:25", proxied=True))
