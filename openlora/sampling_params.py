"""How one request samples its tokens: shared by gateway, workers and engine, stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from openlora.errors import InvalidRequest

MAX_TOKENS_LIMIT = 1 << 20
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
SEED_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one request; checked when made.

    Attributes:
        max_tokens: most tokens to generate, EOS included.
        temperature: 0 is greedy (the largest logit; ties go to the smallest token ID).
        top_p: nucleus, in (0, 1]; 1 keeps everything.
        top_k: keep the k most likely tokens; 0 keeps everything.
        min_p: keep tokens of at least ``min_p`` × the largest probability; 0 keeps everything.
        seed: key of the request's noise. The engine's result depends on (logits, seed, index)
            alone, never on what shares the batch. None: the engine draws one.
        stop: strings that end the output; they are not part of the text.
        ignore_eos: go on past the model's end-of-sequence tokens.
        repetition_penalty: > 1 makes tokens of the prompt and output less likely (CTRL, Keskar
            et al. 2019); 1 is off.
        presence_penalty, frequency_penalty: OpenAI's definitions, over output tokens alone.
        logprobs: number of alternatives to report with each token; 0 is off.

    Raises:
        InvalidRequest: naming the field, its value and the allowed range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = 0

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("top_p", self.top_p, 0, 1, low_open=True)
        _check_range("top_k", self.top_k, 0, SEED_LIMIT)
        _check_range("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, SEED_LIMIT - 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0, 10, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop has {len(self.stop)} strings; send at most {MAX_STOP_STRINGS}"
            )
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequest(
                    f"a stop string has {len(text)} characters; "
                    f"each must have 1 to {MAX_STOP_STRING_CHARS}"
                )

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the next one's odds by a penalty."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def _check_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    too_low = value <= low if low_open else value < low
    if not math.isfinite(value) or too_low or value > high:
        bracket = "(" if low_open else "["
        raise InvalidRequest(f"{name} is {value}; it must be in {bracket}{low}, {high}]")
