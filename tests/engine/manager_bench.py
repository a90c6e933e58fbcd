"""An adapter manager by itself: its pages are a table of what was written where."""

from __future__ import annotations

from pathlib import Path

from openlora.adapters.lora_set import LoRASet
from openlora.adapters.pages import PagePool
from openlora.engine.adapter_manager import AdapterManager
from openlora.engine.scheduler import Wait
from openlora.engine.sequence import Sequence
from tests.engine.fake_device import load_fake
from tests.engine.sequences import make_sequence

WAIT_S = 10


class Bench:
    def __init__(self, pages=(2, 2, 2, 2), load=load_fake, **settings) -> None:
        self.pool = PagePool(pages)
        self.content: dict[tuple[int, int], str] = {}
        self.manager = AdapterManager(self.pool, load, self.write, **settings)
        self.number = 0

    def write(self, pages, adapter) -> None:
        for site, ids in enumerate(pages):
            for page in ids:
                self.content[site, page] = adapter.info.hash

    def register(self, *directories: str) -> None:
        for directory in directories:
            self.manager.register(directory.split("-")[0], Path("/adapters") / directory)

    def want(self, **adapters: float) -> Sequence:
        self.number += 1
        resolved = self.manager.retain(self.number, adapters)
        return make_sequence(self.number, [1], adapters=resolved)

    def load_all(self) -> list[object]:
        """Wait for every load; the errors."""
        errors = []
        while results := self.manager.poll(WAIT_S):
            errors += [error for _, error in results if error is not None]
        self.manager.check_integrity()
        return errors

    def acquire(self, sequence: Sequence) -> LoRASet | Wait:
        outcome = self.manager.acquire(sequence)
        self.manager.check_integrity()
        return outcome

    def run(self, **adapters: float) -> Sequence:
        sequence = self.want(**adapters)
        self.load_all()
        assert isinstance(self.acquire(sequence), LoRASet)
        return sequence

    def end(self, sequence: Sequence) -> None:
        self.manager.release(sequence)
        self.manager.drop(sequence.sequence_id, sequence.adapters)
        self.manager.check_integrity()
