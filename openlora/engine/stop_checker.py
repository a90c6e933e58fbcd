"""When a generation ends, and which of its text may be shown already. Pure, stdlib only."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from openlora.sampling_params import SamplingParams

Stop = Literal["stop", "length"]


def token_stop(
    token_id: int, num_tokens: int, params: SamplingParams, eos_token_ids: Collection[int]
) -> Stop | None:
    """Whether a token ends its request by its ID ("stop") or its number ("length").

    Args:
        token_id: the newest token.
        num_tokens: output tokens with it, those of earlier runs included.
    """
    if token_id in eos_token_ids and not params.ignore_eos:
        return "stop"
    return "length" if num_tokens >= params.max_tokens else None


class StopChecker:
    """Follows one output token by token.

    Text that may be the beginning of a stop string is held back until it cannot be; of a complete
    stop string nothing is shown. Feeding the same tokens again gives the same answers, which is
    how a resumed request finds its state.

    Args:
        params: of the request.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, params: SamplingParams, eos_token_ids: Collection[int]) -> None:
        self.num_tokens = 0
        self._params = params
        self._eos_token_ids = frozenset(eos_token_ids)
        self._held = ""

    def feed(self, token_id: int, text: str) -> tuple[str, Stop | None]:
        """Take the next token and the text it completes.

        Returns:
            The text that may be shown now, and why the output ends with this token, if it does.
            What is then still held back comes from ``finish``.
        """
        self.num_tokens += 1
        stop = token_stop(token_id, self.num_tokens, self._params, self._eos_token_ids)
        visible, found = self._show(text)
        return visible, "stop" if found else stop

    def finish(self, text: str = "") -> str:
        """The output has ended: what may still be shown, ``text`` from the detokenizer included.

        Empty after a stop string. Returns the held text once.
        """
        visible, found = self._show(text)
        rest, self._held = self._held, ""
        return visible if found else visible + rest

    def _show(self, text: str) -> tuple[str, bool]:
        if not self._params.stop or not text:
            return text, False
        pending = self._held + text
        starts = [start for stop in self._params.stop if (start := pending.find(stop)) >= 0]
        if starts:
            self._held = ""
            return pending[: min(starts)], True
        num_held = max(_overlap(pending, stop) for stop in self._params.stop)
        visible = pending[: len(pending) - num_held]
        self._held = pending[len(visible) :]
        return visible, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
