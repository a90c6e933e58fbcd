"""How many prompt tokens of batch sequences a step may hold. No I/O; the clock is the caller's.

All at once they would make one long step, and an interactive prompt that comes meanwhile waits for
its end. The engine's own speed decides: while interactive work is about, they make a step longer
by less than it takes without them, so that who comes at the worst moment waits for less than two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from openlora.engine.step_budget import ScheduledRow

SHARE = 0.4
"""Of a step without prompts: what prompts may add to it."""
LONGER_S = 0.1
"""What they may add while no interactive work is about, where that is more."""
ABOUT_S = 30.0
"""Interactive work counts as being about for so long after it was last there."""
FIRST_TOKENS = 64
LEAST_TOKENS = 32
MOST_TOKENS = 2048
CERTAIN = 0.7
"""Of what prompts are expected to add to a step: what they add at least."""
PROBE_EVERY = 8
"""One step of so many takes no prompt of a batch, and shows how long a step is without."""
_WINDOW = 16
_FIXED_ROWS = 16
"""A step without prompts takes as long as so many rows, and so much more for each row."""


class BatchPace:
    """Watches how long steps take with and without prompts."""

    def __init__(self) -> None:
        self._limit = FIRST_TOKENS
        self._plain_s = 0.0
        self._plain_rows = 0
        self._plain_steps: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._tokens_per_s = 0.0
        self._seen: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._steps = 0
        self._decoded = False
        self._about_until = 0.0
        self._done_s = 0.0

    @property
    def tokens(self) -> int:
        """Of the next step: most prompt tokens of batch sequences."""
        return 0 if self._decoded and not self._steps % PROBE_EVERY else self._limit

    @property
    def step_s(self) -> float:
        """What the last step took that held no prompt; 0: there was none."""
        return self._plain_s

    def skip(self) -> None:
        """Nothing could run in a step."""
        self._steps += 1

    def take(self, rows: Sequence[ScheduledRow], began_s: float, now_s: float) -> None:
        """These rows' step, launched at ``began_s``, was done at ``now_s`` (monotonic)."""
        seconds = now_s - self.begin_of(began_s)
        self._done_s = now_s
        self._steps += 1
        decodes = tokens = 0
        for row in rows:
            if row.num_tokens == 1:
                decodes += 1
            else:
                tokens += row.num_tokens
            if row.sequence.priority == "interactive":
                self._about_until = now_s + ABOUT_S
        self._decoded = decodes > 0
        if not tokens:
            self._plain_s, self._plain_rows = seconds, decodes
            self._plain_steps.append((seconds, decodes))
            return
        self._learn(tokens, max(0.0, seconds - self.plain_s(decodes)))
        longer_s = SHARE * self.plain_s(decodes)
        if not self.is_interactive_about(now_s):
            longer_s = max(LONGER_S, longer_s)
        limit = round(self._tokens_per_s * longer_s)
        self._limit = min(MOST_TOKENS, max(LEAST_TOKENS, limit))

    def is_interactive_about(self, now_s: float) -> bool:
        """Whether interactive work was there a while ago."""
        return now_s < self._about_until

    def begin_of(self, launched_s: float) -> float:
        """When a step that was launched then began: not before the one in front of it was done."""
        return max(launched_s, self._done_s)

    def least_s(self, rows: int) -> float:
        """What a step of so many decodes takes at least, going by the last ones without prompts:
        more rows make none shorter, fewer rows none shorter than by their share."""
        if not rows:
            return 0.0
        return min(
            (
                seconds * min(1.0, (rows + _FIXED_ROWS) / (decodes + _FIXED_ROWS))
                for seconds, decodes in self._plain_steps
            ),
            default=0.0,
        )

    def least_of(self, rows: Sequence[ScheduledRow]) -> float:
        """What a step of these rows takes at least; 0 where nothing decodes in it: one of prompts
        alone may be short."""
        decodes = sum(row.num_tokens == 1 for row in rows)
        least_s = self.least_s(decodes)
        if not least_s or not self._tokens_per_s:
            return least_s
        prompts = sum(row.num_tokens for row in rows) - decodes
        return least_s + CERTAIN * prompts / self._tokens_per_s

    def plain_s(self, rows: int) -> float:
        """Seconds of a step of so many decodes and no prompt, as far as is known."""
        if not rows:
            return 0.0
        return self._plain_s * (rows + _FIXED_ROWS) / (self._plain_rows + _FIXED_ROWS)

    def _learn(self, tokens: int, longer_s: float) -> None:
        # What one step takes by chance more or less evens out over several.
        self._seen.append((tokens, longer_s))
        all_tokens, all_s = map(sum, zip(*self._seen, strict=True))
        measured = all_tokens / max(all_s, 1e-4)
        self._tokens_per_s = min(measured, 2 * self._tokens_per_s or measured)
