"""Long prompts become token IDs beside the loop, in a thread of their own.

The tokenizers library keeps the interpreter to itself while it reads a text: seconds for the
longest that a message takes, in which no stream of this worker would move and Kafka would hear no
heartbeat. For a list of texts it lets go of it (``PromptTokenizer.encode_aside``).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from workers.tokenizer import Prompted, PromptTokenizer

T = TypeVar("T")

LONG_CHARS = 4_000
"""What is shorter is read on the spot, in a few milliseconds."""


def is_long(prompted: Prompted) -> bool:
    """Whether a prompt is to be read beside the loop."""
    if prompted.messages is None:
        return len(prompted.prompt or "") > LONG_CHARS
    return sum(len(message.content) for message in prompted.messages) > LONG_CHARS


class _Asked(NamedTuple, Generic[T]):
    whose: T
    tokenizer: PromptTokenizer
    prompted: Prompted


class Reader(Generic[T]):
    """Reads prompts one after the other, those of different owners in turn.

    ``begin`` and ``finished`` are the loop's thread's alone.

    Args:
        max_tokens: of a text that is surely longer only the beginning is read.
        wake: called by the reader's thread when one is finished.
    """

    def __init__(self, max_tokens: int, wake: Callable[[], None]) -> None:
        self._max_tokens = max_tokens
        self._wake = wake
        self._lines: dict[str, deque[_Asked[T]]] = {}
        self._finished: deque[tuple[T, list[int] | Exception]] = deque()
        self._some = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def begin(self, whose: T, owner: str, tokenizer: PromptTokenizer, prompted: Prompted) -> None:
        """Read this prompt when it is ``owner``'s turn; ``finished`` tells of it as ``whose``."""
        with self._some:
            self._lines.setdefault(owner, deque()).append(_Asked(whose, tokenizer, prompted))
            self._some.notify()
        if self._thread.ident is None:
            self._thread.start()

    def finished(self) -> list[tuple[T, list[int] | Exception]]:
        """What was read since the last call: the token IDs, or why there are none."""
        found = []
        while self._finished:
            found.append(self._finished.popleft())
        return found

    def _run(self) -> None:
        while True:
            asked = self._next()
            answer: list[int] | Exception
            try:
                answer = asked.tokenizer.encode_aside(asked.prompted, self._max_tokens)
            except Exception as error:  # noqa: BLE001 (the loop decides what it means)
                answer = error
            self._finished.append((asked.whose, answer))
            self._wake()

    def _next(self) -> _Asked[T]:
        with self._some:
            while not self._lines:
                self._some.wait()
            owner, line = next(iter(self._lines.items()))
            asked = line.popleft()
            del self._lines[owner]
            if line:
                self._lines[owner] = line  # behind the others
            return asked
