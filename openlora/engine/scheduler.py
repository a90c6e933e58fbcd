"""Who computes how many tokens in the next step. Pure and deterministic: no clock, no I/O.

Order within the one token budget of a step:

1. decodes, interactive before batch, old before young; where blocks run out, the last of that
   order loses its blocks and will be computed again (preemption by recompute);
2. prefill chunks of sequences that run already;
3. new sequences from the queue.

In 2 and 3 batch sequences have a smaller budget of their own (see batch_pace.py).

A step that computes an interactive prompt leaves running batch sequences out, at most every second
step, so that its first token comes as on an empty system. They give up seats and blocks for it.

In 2 and 3 interactive work comes before batch work, but a batch sequence that was passed over in
``BATCH_PATIENCE_STEPS`` steps comes first in the next one, and one that was preempted
``MAX_BATCH_PREEMPTIONS`` times counts as interactive from then on.

New sequences come by age, but tenants share the seats, and nobody's flood of one adapter keeps
others waiting (see fair_queue.py).

A sequence whose adapter is not loaded, or for whose adapter there are no pages, leaves the queue
(it is parked, see waiting.py) and holds up nobody. Where more adapters are wanted than there are
pages for, sequences take turns (see adapter_turns.py). One that has been waiting for pages for
``ROOM_PATIENCE_STEPS`` steps keeps further sequences with adapters from starting until it has them,
so that popular adapters cannot keep rare ones out for ever.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from openlora.engine.adapter_turns import AdapterTurns, Residency, Wait
from openlora.engine.kv_blocks import BlockManager
from openlora.engine.request import Priority
from openlora.engine.sequence import Sequence, Status
from openlora.engine.step_budget import ScheduledRow, StepBudget
from openlora.engine.waiting import WaitingSequences

BATCH_PATIENCE_STEPS = 7
MAX_BATCH_PREEMPTIONS = 3


def _yields(sequence: Sequence) -> bool:
    """Whether it makes way for interactive ones."""
    return sequence.priority == "batch" and sequence.num_preemptions < MAX_BATCH_PREEMPTIONS


def _rank(sequence: Sequence) -> tuple[bool, int]:
    """Smaller runs first and is preempted last."""
    return _yields(sequence), sequence.sequence_id


class Scheduler:
    """Holds every unfinished sequence in exactly one place: among the running or the waiting.

    Args:
        blocks: the KV cache's book-keeper.
        residency: the adapters' book-keeper.
        max_num_seqs: most sequences that run at a time.
        max_num_batched_tokens: most tokens of a step, at least ``max_num_seqs``.
        step_sizes: as in ``EngineParts``.
    """

    def __init__(
        self,
        blocks: BlockManager,
        residency: Residency,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        step_sizes: tuple[int, ...] = (),
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs
        self.blocks = blocks
        self.running: list[Sequence] = []  # in the order of _rank
        self.num_preemptions = 0
        self._residency = residency
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._step_sizes = step_sizes
        self._waiting = WaitingSequences(residency.room_epoch)
        self._turns = AdapterTurns(residency, blocks, self._waiting, max_num_seqs)
        self._batch_passed_over = 0
        self._batch_sat_out = False

    @property
    def num_running(self) -> int:
        """Sequences that the next step may compute."""
        return len(self.running) - self._turns.num_paused

    @property
    def num_waiting(self) -> int:
        """Sequences that could start now but for seats, blocks and budget."""
        return self._waiting.num_queued

    @property
    def num_waiting_batch(self) -> int:
        """Those of them that no interactive one waits for."""
        return self._waiting.num_queued_batch

    @property
    def num_parked(self) -> int:
        """Sequences that wait for an adapter, or for its pages."""
        return self._waiting.num_parked + self._turns.num_paused

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._turns.add(sequence)
        self._waiting.enqueue(sequence)

    def finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take a sequence out, wherever it is; ``forget`` drops its KV from the prefix cache."""
        if sequence.status is Status.RUNNING:
            self._stop_running(sequence, forget=forget)
        self._turns.end(sequence)
        self._turns.remove(sequence)
        self._waiting.leave(sequence)
        sequence.status = Status.FINISHED

    def unpark_loaded(self, adapter: str) -> list[Sequence]:
        """``adapter`` was loaded or failed: its waiters queue again, and are returned by age."""
        return self._waiting.wake_loaded(adapter)

    def schedule(
        self, step: int, batch_tokens: int | None = None, step_s: float = 0.0
    ) -> list[ScheduledRow]:
        """Choose the rows of step number ``step`` and count their tokens as computed.

        ``batch_tokens``: most prompt tokens of batch sequences; None: as many as fit. ``step_s``:
        what a step takes; 0: not known.
        """
        self._turns.take(self.running, step, step_s)
        self._waiting.wake_for_room(self._residency.room_epoch)
        rows: list[ScheduledRow] = []
        tokens = self._max_num_batched_tokens
        budget = StepBudget(tokens, tokens if batch_tokens is None else batch_tokens)
        is_urgent = self._is_urgent() and not self._batch_sat_out
        self._schedule_decodes(rows, budget, batch=False)
        if is_urgent:
            num_decodes = len(rows)
            self._schedule_prefills(rows, budget, "interactive")
            self._admit(rows, budget, ("interactive",), step, make_room=True)
            if len(rows) > num_decodes:
                self._turns.resume(self.running, step)
                self._batch_sat_out = True
                self._count_patience(rows[num_decodes:])
                return rows
        self._batch_sat_out = False
        self._schedule_decodes(rows, budget, batch=True)
        num_decodes = len(rows)
        budget.fill(num_decodes, self._step_sizes)
        order: tuple[Priority, ...] = ("interactive", "batch")
        if self._batch_passed_over >= BATCH_PATIENCE_STEPS:
            order = ("batch", "interactive")
        for priority in order:
            self._schedule_prefills(rows, budget, priority)
        self._admit(rows, budget, order, step)
        self._turns.resume(self.running, step, is_idle=not rows)
        self._count_patience(rows[num_decodes:])
        return rows

    def check_integrity(self) -> None:
        """Assert that every sequence is in one place and only running ones hold blocks."""
        self.blocks.check_integrity(self.running)
        everywhere = [s.sequence_id for s in self.running + self._waiting.check_integrity()]
        assert len(everywhere) == len(set(everywhere)), "a sequence is in two places"
        assert all(s.status is Status.RUNNING for s in self.running)
        assert self.running == sorted(self.running, key=_rank)
        self._turns.check_integrity(self.running)

    def _is_urgent(self) -> bool:
        """Whether interactive prompts wait while batch sequences run."""
        if not self.running or not _yields(self.running[-1]):
            return False
        return self._waiting.first("interactive") is not None or any(
            s.priority == "interactive" and s.num_uncomputed_tokens > 1 for s in self.running
        )

    def _schedule_decodes(
        self, rows: list[ScheduledRow], budget: StepBudget, *, batch: bool
    ) -> None:
        """Those of batch sequences, which are behind all others in ``running``, or the others'."""
        i = bisect_left(self.running, batch, key=_yields)
        while i < len(self.running):
            sequence = self.running[i]
            if _yields(sequence) is not batch:
                break
            is_due = sequence.num_uncomputed_tokens == 1 and sequence.paused_at_step < 0
            if not is_due or not sequence.is_ready:
                i += 1
            elif self._grow(sequence):
                rows.append(budget.take_decode(sequence))
                i += 1

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for a decode; False where the sequence itself had to give up its blocks."""
        while not self.blocks.grow(sequence):
            # The last one was not scheduled yet: this loop runs from the front.
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _schedule_prefills(
        self, rows: list[ScheduledRow], budget: StepBudget, priority: Priority
    ) -> None:
        for sequence in self.running:
            if not budget.left(priority):
                break
            if sequence.priority == priority and sequence.num_uncomputed_tokens > 1:
                rows.append(budget.take_chunk(sequence))

    def _admit(
        self,
        rows: list[ScheduledRow],
        budget: StepBudget,
        order: tuple[Priority, ...],
        step: int,
        *,
        make_room: bool = False,
    ) -> None:
        """``make_room``: batch sequences, which have no rows yet, give up seats and blocks."""
        for priority in order:
            if priority == "batch":
                self._turns.resume(self.running, step)
            while budget.left(priority) and (make_room or len(self.running) < self._max_num_seqs):
                sequence = self._waiting.first(priority, self.running)
                if sequence is None:
                    break
                if sequence.num_pending_tokens:
                    break  # preempted while its token was on the way: wait until it is read
                wait = self._acquire(sequence, step)
                if wait is Wait.LOADING:
                    self._turns.unreserve(sequence)
                    self._waiting.park_until_loaded(sequence)
                    continue
                if wait is Wait.NO_ROOM:
                    self._waiting.park_until_room(sequence, step)
                    continue
                if not self._place(sequence, make_room=make_room):
                    # Nobody overtakes: smaller ones would keep a large one waiting for ever.
                    self._residency.release(sequence)
                    self._turns.unreserve(sequence)
                    return
                self._start_running(sequence, step)
                rows.append(budget.take_chunk(sequence))

    def _place(self, sequence: Sequence, *, make_room: bool) -> bool:
        """Give a sequence a seat and its first blocks; False where there is none of either."""
        while len(self.running) >= self._max_num_seqs or not self.blocks.admit(
            sequence, num_reserved=len(self.running)
        ):
            if not make_room or not self.running or not _yields(self.running[-1]):
                return False
            self._preempt(self.running[-1])
        return True

    def _acquire(self, sequence: Sequence, step: int) -> Wait | None:
        """Fetch the sequence's LoRA set; None on success."""
        if not sequence.adapters:
            return None
        if self._turns.holds_back(sequence, self.running, step):
            return Wait.NO_ROOM
        outcome = self._residency.acquire(sequence)
        if isinstance(outcome, Wait):
            return outcome
        sequence.lora_set = outcome
        return None

    def _start_running(self, sequence: Sequence, step: int) -> None:
        self._waiting.start(sequence)
        self._turns.begin(sequence, step)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)

    def _stop_running(self, sequence: Sequence, *, forget: bool = False) -> None:
        del self.running[bisect_left(self.running, _rank(sequence), key=_rank)]
        self.blocks.release(sequence, forget=forget)
        if not self._turns.end(sequence):
            self._residency.release(sequence)

    def _preempt(self, victim: Sequence) -> None:
        self._stop_running(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.enqueue(victim)

    def _count_patience(self, rows: list[ScheduledRow]) -> None:
        """Count the steps in a row in which interactive prefills kept batch ones waiting."""
        batch_waits = self._waiting.first("batch") is not None or any(
            s.priority == "batch" and s.num_uncomputed_tokens > 1 for s in self.running
        )
        if not batch_waits or any(row.sequence.priority == "batch" for row in rows):
            self._batch_passed_over = 0
        elif rows:
            self._batch_passed_over += 1
