"""The rows of a step, and the tokens that are left for further ones. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Items
from dataclasses import dataclass

from openlora.engine.request import Priority
from openlora.engine.sequence import Sequence
from openlora.engine.step import PendingStep


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """``num_tokens`` tokens of ``sequence`` from position ``start`` on.

    ``samples``: the last of them is the sequence's last, so that a new token is drawn.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that was launched at ``began_s`` (monotonic) and may still run."""

    number: int
    rows: list[ScheduledRow]
    pending: PendingStep
    began_s: float


@dataclass(slots=True)
class StepBudget:
    """What is left of a step.

    Attributes:
        tokens: in all.
        batch_tokens: of those, the most that prompts of batch sequences may take.
    """

    tokens: int
    batch_tokens: int

    def left(self, priority: Priority) -> int:
        """Tokens left for prompts of this priority."""
        return min(self.tokens, self.batch_tokens) if priority == "batch" else self.tokens

    def fill(self, num_tokens: int, sizes: Items[int]) -> None:
        """Let prompts of batch sequences end the step, of ``num_tokens`` so far, at one of
        ``sizes``: it is rounded up to one anyway, and what is not computed would be wasted.

        They take no more than they may, or else what takes the step to the next size; steps
        beyond the last size are not rounded.
        """
        most = num_tokens + self.batch_tokens
        if not self.batch_tokens or not sizes or most > sizes[-1]:
            return
        at = bisect_right(sizes, most) - 1
        if at < 0 or sizes[at] <= num_tokens:
            at += 1
        self.batch_tokens = sizes[at] - num_tokens

    def take_decode(self, sequence: Sequence) -> ScheduledRow:
        """The sequence's next token."""
        self.tokens -= 1
        return _row(sequence, 1)

    def take_chunk(self, sequence: Sequence) -> ScheduledRow:
        """As much of the sequence's prompt as there is room for."""
        num_tokens = min(sequence.num_uncomputed_tokens, self.left(sequence.priority))
        self.tokens -= num_tokens
        if sequence.priority == "batch":
            self.batch_tokens -= num_tokens
        return _row(sequence, num_tokens)


def _row(sequence: Sequence, num_tokens: int) -> ScheduledRow:
    start = sequence.num_computed_tokens
    sequence.num_computed_tokens += num_tokens
    return ScheduledRow(sequence, start, num_tokens, samples=not sequence.num_uncomputed_tokens)
