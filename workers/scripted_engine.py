"""An engine that computes nothing: it says tokens at a set rate, to load everything around it.

It has the methods of ``openlora.engine.Engine`` that a worker uses. Tokens are either a fixed
function of prompt and index (so that a resumed run goes on as it would have), or the time of the
step, so that a client on the same host can tell how long a token travelled without anything being
added to the protocol.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from openlora.adapters.tier_stats import TierStats
from openlora.engine.request import FinishReason, Request, TokenOutput

CLOCK_TICK_NS = 100_000
CLOCK_TICKS = 1 << 15
POISON_TOKEN = 255
"""A prompt that holds it kills the process at the third token of each run: for tests of faults.
In the benchmark's tokenizer it is the last byte of a soft hyphen."""
POISON_ADAPTER = "dead"
"""So does an adapter whose name begins so, at the first."""
_POISON_STEPS = 3
"""A clock token is CLOCK_MONOTONIC in 0.1 ms ticks, modulo 3.2768 s."""

SCRIPTED_VOCAB_SIZE = CLOCK_TICKS
SCRIPTED_MODEL_LEN = 1 << 17
SCRIPTED_SEATS = 512
"""It has no limit; what is said to those who plan by one."""


def clock_token(now_ns: int) -> int:
    """The token ID that says ``now_ns`` (CLOCK_MONOTONIC nanoseconds)."""
    return now_ns // CLOCK_TICK_NS % CLOCK_TICKS


def clock_age_ms(token_id: int, now_ns: int) -> float:
    """Milliseconds since the step that said ``token_id``, for ages under 3.2 s."""
    return (clock_token(now_ns) - token_id) % CLOCK_TICKS * CLOCK_TICK_NS / 1e6


@dataclass(frozen=True, slots=True)
class ScriptedModelInfo:
    """What a worker reports of the model."""

    max_model_len: int = SCRIPTED_MODEL_LEN
    vocab_size: int = SCRIPTED_VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = ()
    hidden_size: int = 0
    max_lora_rank: int = 0
    dtype: str = "none"
    device: str = "scripted"
    attention_backend: str = "none"


@dataclass(frozen=True, slots=True)
class ScriptedStats:
    """How busy it is."""

    running: int
    waiting: int
    resident_adapters: tuple[str, ...]
    tiers: tuple[TierStats, ...] = ()
    waiting_batch: int = 0


@dataclass(slots=True)
class _Run:
    request: Request
    index: int
    first_token: int = field(init=False)
    end: int = field(init=False)
    deadly_index: int = field(init=False)
    """Of the token that kills; -1: none does."""

    def __post_init__(self) -> None:
        self.first_token = sum(self.request.prompt_token_ids) % SCRIPTED_VOCAB_SIZE
        self.end = self.request.params.max_tokens
        self.deadly_index = -1
        if POISON_TOKEN in self.request.prompt_token_ids:
            self.deadly_index = self.index + _POISON_STEPS - 1
        if any(name.startswith(POISON_ADAPTER) for name in self.request.adapters):
            self.deadly_index = self.index


class ScriptedEngine:
    """Says one token per running request and step.

    Args:
        steps_per_s: pace of the steps; 0 is as fast as the tokens are taken.
        clock_tokens: token IDs say the time of the step instead of the script.
    """

    def __init__(self, steps_per_s: float = 0, *, clock_tokens: bool = False) -> None:
        self.model_info = ScriptedModelInfo()
        self._interval_ns = int(1e9 / steps_per_s) if steps_per_s else 0
        self._clock_tokens = clock_tokens
        self._runs: dict[int, _Run] = {}
        self._next_id = 0
        self._next_step_ns = 0
        self._registered: dict[str, str] = {}

    def add(self, request: Request) -> int:
        """Begin a request; it says its next token in the next step."""
        request_id = self._next_id
        self._next_id += 1
        self._runs[request_id] = _Run(request, len(request.output_token_ids))
        return request_id

    def abort(self, request_id: int) -> None:
        """Forget a request; unknown ones are ignored."""
        self._runs.pop(request_id, None)

    def has_work(self) -> bool:
        """Whether a step would say anything."""
        return bool(self._runs)

    def launch_wait_s(self) -> float:
        """Never: it launches nothing ahead."""
        return 0.0

    def pin_adapters(self, names: Collection[str]) -> None:
        """Nothing: it keeps none."""

    def take_loads(self) -> bool:
        """Nothing is ever under way."""
        return False

    def only_waits_for_adapters(self) -> bool:
        """Never: it loads none."""
        return False

    def register_adapter(self, name: str, path: str) -> None:
        """Remember the name; nothing is loaded."""
        self._registered[name] = path

    def stats(self) -> ScriptedStats:
        """Every request runs; every registered adapter counts as resident."""
        names = tuple(self._registered)
        tier = TierStats("device", adapters=len(names), loads=len(names), names=names)
        return ScriptedStats(len(self._runs), 0, names, (tier,))

    def step(self) -> list[TokenOutput]:
        """Wait for the step's time, then say one token for every request."""
        now = self._await_step()
        outputs = []
        finished = []
        clock = clock_token(now)
        for request_id, run in self._runs.items():
            index = run.index
            if index == run.deadly_index:
                os.abort()
            run.index = index + 1
            reason: FinishReason | None = None
            if run.index >= run.end:
                reason = "length"
                finished.append(request_id)
            token = clock if self._clock_tokens else script(run.first_token, index)
            outputs.append(TokenOutput(request_id, index, token, finish_reason=reason))
        for request_id in finished:
            del self._runs[request_id]
        return outputs

    def _await_step(self) -> int:
        """Pace by a schedule, not by pauses, so that a late step does not delay those after it.

        A step more than 100 ms late starts a new schedule: a burst would measure nothing real.
        """
        now = time.monotonic_ns()
        if not self._interval_ns:
            return now
        if now < self._next_step_ns:
            time.sleep((self._next_step_ns - now) / 1e9)
            now = time.monotonic_ns()
        elif now - self._next_step_ns > 100_000_000:
            self._next_step_ns = now
        self._next_step_ns += self._interval_ns
        return now


def script(first_token: int, index: int) -> int:
    """The scripted token at ``index``: spread over the vocabulary, the same on every run."""
    return (first_token + 7919 * index) % SCRIPTED_VOCAB_SIZE
