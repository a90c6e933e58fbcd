"""A scheduler by itself: sequences without tokens that mean anything, adapters that are names."""

from __future__ import annotations

from dataclasses import dataclass, field

from openlora.adapters.lora_set import LoRASet
from openlora.engine.kv_blocks import BlockManager
from openlora.engine.scheduler import Scheduler, Wait
from openlora.engine.sequence import Sequence, Status
from tests.engine.sequences import make_sequence


@dataclass
class Slots:
    """Room for ``size`` adapters; those in ``cold`` are not loaded."""

    size: int = 2
    cold: set[str] = field(default_factory=set)
    users: dict[str, set[int]] = field(default_factory=dict)
    room_epoch: int = 0
    load_s: float = 0.0

    def acquire(self, sequence: Sequence) -> LoRASet | Wait:
        names = [name for name, _ in sequence.adapters]
        if self.cold & set(names):
            return Wait.LOADING
        busy = {name for name, users in self.users.items() if users}
        if len(busy | set(names)) > self.size:
            return Wait.NO_ROOM
        for name in names:
            self.users.setdefault(name, set()).add(sequence.sequence_id)
        return LoRASet(pages=((), (), (), ()), key="+".join(names))

    def fit_together(self, keys) -> bool | None:
        return None if self.cold & set(keys) else len(set(keys)) <= self.size

    def turn_s(self, keys) -> float | None:
        return self.load_s if len(keys) <= 2 * self.size else None

    def release(self, sequence: Sequence) -> None:
        for name, _ in sequence.adapters:
            self.users[name].remove(sequence.sequence_id)
            self.room_epoch += 1


class Bench:
    """A scheduler whose sequences get token 1 whenever they are due for one."""

    def __init__(
        self, num_blocks=64, slots=None, seqs=8, budget=32, caching=False, step_sizes=()
    ) -> None:
        self.slots = slots or Slots()
        self.blocks = BlockManager(num_blocks, 4, enable_prefix_caching=caching)
        self.scheduler = Scheduler(
            self.blocks,
            self.slots,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            step_sizes=step_sizes,
        )
        self.batch_tokens: int | None = None
        self.step_s = 0.0
        self.number = 0
        self.step_number = 0
        self.finished: list[int] = []

    def add(self, length=4, *, n=4, priority="interactive", adapter=None, tenant="") -> Sequence:
        self.number += 1
        adapters = ((adapter, 1.0),) if adapter else ()
        sequence = make_sequence(
            self.number, [0] * length, max_tokens=n, priority=priority, adapters=adapters
        )
        sequence.tenant = tenant
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[int, int]]:
        """Run one step; (sequence, tokens) of each row. One without rows has no number, as in
        the engine."""
        rows = self.scheduler.schedule(self.step_number + 1, self.batch_tokens, self.step_s)
        self.step_number += bool(rows)
        self.scheduler.check_integrity()
        assert sum(row.num_tokens for row in rows) <= self.scheduler._max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler._max_num_seqs
        for row in rows:
            sequence = row.sequence
            assert sequence.status is Status.RUNNING
            assert len(sequence.block_table) * 4 >= row.start + row.num_tokens
            if row.samples:
                sequence.token_ids.append(1)
                if sequence.num_output_tokens == sequence.max_output_tokens:
                    self.scheduler.finish(sequence)
                    self.finished.append(sequence.sequence_id)
        return [(row.sequence.sequence_id, row.num_tokens) for row in rows]

    def run(self, steps=1000) -> None:
        for _ in range(steps):
            if not (self.scheduler.running or self.scheduler.num_waiting):
                return
            self.step()
        raise AssertionError("not done")


def running(bench: Bench) -> set[int]:
    """Sequences that have pages and a seat."""
    return {s.sequence_id for s in bench.scheduler.running if s.paused_at_step < 0}
