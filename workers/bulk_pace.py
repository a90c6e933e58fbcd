"""How many of a batch's prompt tokens may join from one step of the engine to the next. Pure.

All at once they would make one long step, and whoever asks next would wait for it. The engine's
own speed decides: what joins makes a step longer by about ``LONGER_S``, on any device.
"""

from __future__ import annotations

from collections import deque

LONGER_S = 0.1
FIRST_TOKENS = 256
LEAST_TOKENS = 32
MOST_TOKENS = 2048
PROBE_EVERY = 8
"""Nothing joins in one step of so many, which shows how long a step takes without prompts."""
_WINDOW = 16


class Pace:
    """Watches how long steps take with and without prompts.

    Attributes:
        room: prompt tokens that may still join before the next step; the last line may exceed it.
    """

    def __init__(self) -> None:
        self.room = FIRST_TOKENS
        self._limit = FIRST_TOKENS
        self._joined = 0  # since the last step: they are computed in the next but one,
        self._computing = 0  # the next one being under way when they join
        self._plain_s = 0.0
        self._tokens_per_s = FIRST_TOKENS / LONGER_S
        self._seen: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._steps = 0
        self._last_s = 0.0

    def join(self, tokens: int) -> None:
        """A line with so many prompt tokens goes to the engine."""
        self.room -= tokens
        self._joined += tokens

    def rest(self) -> None:
        """The engine has nothing of ours: no step would come to make room again."""
        self.room = self._limit
        self._last_s = 0.0
        self._joined = self._computing = 0

    def step(self, count: int, now_s: float) -> None:
        """``count`` steps have ended by ``now_s`` (monotonic)."""
        if self._last_s:
            self._learn((now_s - self._last_s) / count)
        self._last_s = now_s
        self._computing, self._joined = self._joined, 0
        self._steps += 1
        self.room = self._limit if self._steps % PROBE_EVERY else 0

    def _learn(self, step_s: float) -> None:
        if not self._computing:
            # Downwards at once, upwards halfway: more lines run beside each other, or it was late.
            known_s = self._plain_s or step_s
            self._plain_s = min(step_s, (known_s + step_s) / 2)
            return
        if not self._plain_s:
            return
        # A step too early or too late to be that of the prompts evens out over several.
        self._seen.append((self._computing, max(0.0, step_s - self._plain_s)))
        tokens, longer_s = map(sum, zip(*self._seen, strict=True))
        self._tokens_per_s = min(tokens / max(longer_s, 1e-3), 2 * self._tokens_per_s)
        limit = self._tokens_per_s * LONGER_S
        self._limit = round(min(MOST_TOKENS, max(LEAST_TOKENS, limit)))
