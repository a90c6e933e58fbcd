"""How many of a batch's prompt tokens may join from one step of the engine to the next. Pure.

All at once they would make one long step, and whoever asks next would wait for it. The engine's
own speed decides: what joins makes a step longer by about ``LONGER_S``, on any device.
"""

from __future__ import annotations

LONGER_S = 0.1
FIRST_TOKENS = 256
LEAST_TOKENS = 32
MOST_TOKENS = 2048
_FORGET = 1.05
_WEIGHT = 0.3


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
        self._tokens_per_s = 0.0
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
        self.room = self._limit

    def _learn(self, step_s: float) -> None:
        if not self._computing:
            # The shortest of late; it grows as more lines run beside each other.
            known_s = self._plain_s * _FORGET or step_s
            self._plain_s = min(step_s, known_s)
            return
        if not self._plain_s:
            return
        rate = self._computing / max(step_s - self._plain_s, 1e-3)
        if self._tokens_per_s:
            rate = self._tokens_per_s + _WEIGHT * (rate - self._tokens_per_s)
        self._tokens_per_s = rate
        self._limit = round(min(MOST_TOKENS, max(LEAST_TOKENS, rate * LONGER_S)))
