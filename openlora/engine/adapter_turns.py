"""Turns of requests whose adapters do not fit the pages together. Pure and deterministic.

A request that has waited for pages for ``NEW_PATIENCE_STEPS`` and has no token yet is let in: those
that have run longest, and for a turn at least, pause. They keep their seats and KV blocks, but not
their adapters' pages. Room that comes free is for new ones first, then for those that pause; behind
``PAUSE_TURNS`` they go before new ones, and others pause for them. So first tokens come soon, an
adapter that was loaded is used before it goes, and nobody waits for the whole of another's answer.

Turns cost loads and give no throughput. So there are none where all that are hot fit; nor where
they are many times what fits, or more than host memory keeps: there each runs to its end. And no
more requests pause than come in for them, so that steps stay as full as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence, Set
from enum import Enum, auto
from typing import Protocol

from openlora.adapters.lora_set import LoRASet
from openlora.engine.kv_blocks import BlockManager
from openlora.engine.sequence import Sequence as TokenSequence
from openlora.engine.waiting import ROOM_PATIENCE_STEPS, WaitingSequences

NEW_PATIENCE_STEPS = 1
"""Whose last step is under way ends by then."""
TURN_STEPS = 16
TURN_S = 0.7
"""A turn has so many steps and seconds at least."""
PAUSE_TURNS = 1.75
"""With one turn, some that pause would always be due: nothing that comes free would be left for new
ones, and adapters would be loaded half as often again. Longer pauses make steps no fuller."""
_RESERVED_STEPS = 8
"""Room that was made is taken in the next steps, or is anybody's again."""


class Wait(Enum):
    """Why a sequence cannot have its LoRA set now."""

    LOADING = auto()
    NO_ROOM = auto()


class Residency(Protocol):
    """What the scheduler needs of the adapter manager."""

    @property
    def room_epoch(self) -> int:
        """Changes whenever a sequence that was told ``NO_ROOM`` should ask again."""

    def acquire(self, sequence: TokenSequence) -> LoRASet | Wait:
        """The sequence's LoRA set, its pages kept in place until ``release``."""

    def release(self, sequence: TokenSequence) -> None:
        """The sequence no longer runs."""

    def fit_together(self, keys: Collection[str]) -> bool | None:
        """Whether these adapters could be in pages at the same time, if no others were in use;
        None where one of them has never been loaded."""

    def turn_s(self, keys: Collection[str]) -> float | None:
        """Seconds that a turn must last to be long beside the loads that it costs, where these are
        all that are wanted; None: no turns, for they are many times what fits into pages, or do
        not stay in host memory when they have to leave them."""


class AdapterTurns:
    """Who of the running makes way, and for whom.

    Args:
        residency: the adapters' book-keeper.
        blocks: the KV cache's.
        waiting: where those are who have no pages.
        max_num_seqs: seats, which those that pause keep.
    """

    def __init__(
        self,
        residency: Residency,
        blocks: BlockManager,
        waiting: WaitingSequences,
        max_num_seqs: int,
    ) -> None:
        self._residency = residency
        self._blocks = blocks
        self._waiting = waiting
        self._max_num_seqs = max_num_seqs
        self._paused: dict[int, TokenSequence] = {}
        # Of those, whose adapters are still in host memory, and only wait for room.
        self._loaded: set[int] = set()
        # Whom room was made for, and in which step.
        self._reserved: dict[int, tuple[TokenSequence, int]] = {}
        self._seen_room_epoch = -1
        # Unfinished sequences by adapter.
        self._wanted: Counter[str] = Counter()
        self._turn_steps = TURN_STEPS

    @property
    def num_paused(self) -> int:
        """Running sequences that have no pages now."""
        return len(self._paused)

    def add(self, sequence: TokenSequence) -> None:
        """A new sequence, wherever it waits."""
        self._wanted.update(_keys(sequence))

    def remove(self, sequence: TokenSequence) -> None:
        """The sequence is finished."""
        for key in _keys(sequence):
            self._wanted[key] -= 1
            if self._wanted[key] <= 0:
                del self._wanted[key]

    def begin(self, sequence: TokenSequence, step: int) -> None:
        """The sequence runs from this step on."""
        sequence.turn_began_step = step
        self.unreserve(sequence)

    def end(self, sequence: TokenSequence) -> bool:
        """The sequence ends, or loses its seat; whether it was paused and has no pages."""
        self.unreserve(sequence)
        self._loaded.discard(sequence.sequence_id)
        sequence.paused_at_step = -1
        return self._paused.pop(sequence.sequence_id, None) is not None

    def unreserve(self, sequence: TokenSequence) -> None:
        """It has its room, or cannot take it: what is left is anybody's."""
        if self._reserved.pop(sequence.sequence_id, None) is not None:
            self._waiting.wake_at_next_chance()
            self._seen_room_epoch = -1

    def holds_back(
        self, sequence: TokenSequence, running: Iterable[TokenSequence], step: int
    ) -> bool:
        """Whether this one would take the room that was made for another, or that another has
        waited for so long that nobody may take any before it."""
        if sequence.sequence_id in self._reserved:
            return False
        if self._waiting.is_held_back(sequence, step):
            return True
        if not self._reserved:
            return False
        keys = _users(running).keys() | self._reserved_keys() | set(_keys(sequence))
        return self._residency.fit_together(keys) is False

    def take(self, running: Sequence[TokenSequence], step: int, step_s: float = 0.0) -> None:
        """Before a step is filled: pause those whose turn is over, where others wait; let those
        go on who have paused for long, or for whom room was made. ``step_s``: what a step takes;
        0: not known."""
        if not self._paused and not self._waiting.has_room_waiters:
            return
        for sequence, since in list(self._reserved.values()):
            if step - since > _RESERVED_STEPS:
                self.unreserve(sequence)
        longest = next(iter(self._paused.values()), None)
        if longest is not None and self._waiting.is_first_for_room(longest.paused_at_step, step):
            self._reserved[longest.sequence_id] = longest, step
        self._make_room(running, step, step_s)
        due = {sequence.sequence_id for sequence in self._due(step)}
        self._resume(due | self._reserved.keys(), running, step)

    def resume(self, running: Sequence[TokenSequence], step: int, *, is_idle: bool = False) -> None:
        """Behind new ones: let those that pause go on, where there is room still, in the next
        step. ``is_idle``: nothing runs in this one."""
        if not self._paused:
            return
        # Room is kept for one that lacks more than pages: blocks, say, which those that pause have.
        # Steps that do not come neither give him any nor end his claim.
        is_stuck = is_idle and not any(s.num_pending_tokens for s in running)
        if is_stuck:
            for sequence, _ in list(self._reserved.values()):
                self.unreserve(sequence)
        self._resume(self._paused.keys(), running, step, is_stuck)
        self._seen_room_epoch = self._residency.room_epoch

    def check_integrity(self, running: Iterable[TokenSequence]) -> None:
        """Assert that those that pause have seats and nothing else runs without pages."""
        paused = {s.sequence_id for s in running if s.paused_at_step >= 0}
        assert paused == self._paused.keys()
        assert self._loaded <= paused

    def _make_room(self, running: Sequence[TokenSequence], step: int, step_s: float) -> None:
        turn_s = self._residency.turn_s(self._wanted.keys())
        if turn_s is None:
            return
        in_steps = round(max(TURN_S, turn_s) / step_s) if step_s else 0
        self._turn_steps = max(TURN_STEPS, in_steps)
        due = self._due(step)
        users = _users(running)
        for sequence in due:
            if self._waiting.is_held_back(sequence, step):
                return  # another has waited so long that nobody may take room before it
            if sequence.sequence_id in self._reserved or not self._has_place(sequence, running):
                continue
            wanted = self._reserved_keys() | set(_keys(sequence))
            victims = self._victims(users, wanted, step)
            if victims is None or len(victims) > sum(_keys(s) == _keys(sequence) for s in due):
                return  # nobody overtakes: the next may want less
            for victim in victims:
                self._residency.release(victim)
                victim.paused_at_step = step
                self._paused[victim.sequence_id] = victim
                self._loaded.add(victim.sequence_id)
            users = _users(running)
            self._reserved[sequence.sequence_id] = sequence, step

    def _victims(
        self, users: dict[str, list[TokenSequence]], wanted: set[str], step: int
    ) -> list[TokenSequence] | None:
        """Who has to pause so that ``wanted`` fit; None: those that may are not enough."""
        chosen: dict[int, TokenSequence] = {}
        by_turn = sorted(
            (max((u.priority == "interactive", u.turn_began_step) for u in found), key)
            for key, found in users.items()
            if key not in wanted and all(self._may_pause(u, step) for u in found)
        )
        for key in (None, *(key for _, key in by_turn)):
            if key is not None:
                chosen |= {u.sequence_id: u for u in users[key]}
            kept = {
                key
                for key, found in users.items()
                if any(u.sequence_id not in chosen for u in found)
            }
            if self._residency.fit_together(kept | wanted):
                return list(chosen.values())
        return None

    def _due(self, step: int) -> list[TokenSequence]:
        """Those that have waited for room long enough, in the order in which it was enough."""
        due = []
        for sequence in self._waiting.room_waiters():
            if sequence.priority == "interactive":
                patience = NEW_PATIENCE_STEPS
                if sequence.num_output_tokens:
                    patience = self._turn_steps
                due.append((sequence.parked_at_step + patience, sequence.sequence_id, sequence))
        for number in self._loaded:
            sequence = self._paused[number]
            # A batch one makes way first and comes back last.
            is_batch = sequence.priority == "batch"
            patience = ROOM_PATIENCE_STEPS if is_batch else round(PAUSE_TURNS * self._turn_steps)
            due.append((sequence.paused_at_step + patience, number, sequence))
        return [sequence for at, _, sequence in sorted(due, key=lambda d: d[:2]) if at <= step]

    def _may_pause(self, sequence: TokenSequence, step: int) -> bool:
        """Whether it has had its turn; a prompt is computed to its end."""
        is_over = step - sequence.turn_began_step >= self._turn_steps
        return is_over and sequence.num_uncomputed_tokens <= 1

    def _has_place(self, sequence: TokenSequence, running: Sequence[TokenSequence]) -> bool:
        """Whether pages are all that it lacks."""
        if sequence.sequence_id in self._paused:
            return True
        seats = self._max_num_seqs - len(running) - len(self._reserved.keys() - self._paused.keys())
        needed = self._blocks.num_blocks_for(sequence.num_tokens) + len(running)
        return seats > 0 and needed <= self._blocks.num_free_blocks

    def _resume(
        self, whom: Set[int], running: Sequence[TokenSequence], step: int, overtakes: bool = False
    ) -> None:
        is_new_room = overtakes or self._residency.room_epoch != self._seen_room_epoch
        for number, sequence in list(self._paused.items()):
            if number not in whom:
                continue
            if not is_new_room and number in self._loaded and number not in self._reserved:
                continue
            # The runner takes an unread token only in the step behind the one that drew it.
            is_held_back = not overtakes and self.holds_back(sequence, running, step)
            if sequence.num_pending_tokens or is_held_back:
                continue
            outcome = self._residency.acquire(sequence)
            if outcome is Wait.NO_ROOM:
                self._loaded.add(number)
            elif outcome is Wait.LOADING:
                self._loaded.discard(number)
            else:
                self.end(sequence)
                sequence.lora_set = outcome
                self.begin(sequence, step)

    def _reserved_keys(self) -> set[str]:
        return {key for sequence, _ in self._reserved.values() for key in _keys(sequence)}


def _keys(sequence: TokenSequence) -> tuple[str, ...]:
    return tuple(key for key, _ in sequence.adapters)


def _users(running: Iterable[TokenSequence]) -> dict[str, list[TokenSequence]]:
    """Those that have pages now, by adapter."""
    users: dict[str, list[TokenSequence]] = {}
    for sequence in running:
        if sequence.paused_at_step < 0:
            for key in _keys(sequence):
                users.setdefault(key, []).append(sequence)
    return users
