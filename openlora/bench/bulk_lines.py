"""The lines of ``bench bulk``, what the scripted engine answers to each, and their check."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from openlora.protocol.codec import encode
from producer.bulk.results import PlainResult
from workers.scripted_engine import SCRIPTED_VOCAB_SIZE, script
from workers.tokenizer import PromptTokenizer

SHOWN = 10


@dataclass(frozen=True, slots=True)
class Lines:
    """``count`` lines over ``adapters`` adapters in turn, each of up to ``tokens`` tokens."""

    count: int
    adapters: int
    tokens: int

    def adapter(self, line: int) -> str:
        """Of a line, counted from 1."""
        return f"a{line % self.adapters}"

    def max_tokens(self, line: int) -> int:
        """Lengths differ, so that lines of a bundle end one after the other."""
        return 1 + line * 7919 % self.tokens

    def prompt(self, line: int) -> str:
        """Different for each line, so that a mixed-up answer is told."""
        return f"line {line}"

    def parts(self) -> Iterator[bytes]:
        """The input, a thousand lines at a time."""
        for first in range(1, self.count + 1, 1000):
            last = min(first + 999, self.count)
            yield b"".join(self._line(line) for line in range(first, last + 1))

    def _line(self, line: int) -> bytes:
        fields = {
            "prompt": self.prompt(line),
            "adapter": self.adapter(line),
            "max_tokens": self.max_tokens(line),
        }
        return json.dumps(fields).encode() + b"\n"

    def write(self, path: Path) -> Path:
        """Write the input; returns ``path``."""
        with path.open("wb") as file:
            file.writelines(self.parts())
        return path


@dataclass(slots=True)
class Verdict:
    """What became of the lines; ``wrong`` shows the first few in words."""

    results: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether every line has its one answer."""
        return not (self.lost or self.doubled or self.changed or self.failed)

    def blame(self, kind: str, words: str) -> None:
        """Count one line that is not as it should be."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.wrong) < SHOWN:
            self.wrong.append(f"{kind}: {words}")


class Expected:
    """What each line's result has to be, byte for byte."""

    def __init__(self, lines: Lines, model: Path) -> None:
        self._lines = lines
        self._tokenizer = PromptTokenizer(str(model)).backend

    def result(self, line: int) -> bytes:
        """The one result of a line."""
        lines = self._lines
        prompt = self._tokenizer.encode(lines.prompt(line)).ids
        first, count = sum(prompt) % SCRIPTED_VOCAB_SIZE, lines.max_tokens(line)
        text = self._tokenizer.decode([script(first, index) for index in range(count)])
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "total_tokens": len(prompt) + count,
        }
        return encode(PlainResult(line, None, lines.adapter(line), text, "length", usage))

    def check(self, results: Iterable[bytes]) -> Verdict:
        """Compare a batch's results, one a line, with what they have to be."""
        verdict = Verdict()
        seen: Counter[int] = Counter()
        last = 0
        for data in results:
            verdict.results += 1
            line = json.loads(data)["line"]
            seen[line] += 1
            if seen[line] > 1:
                verdict.blame("doubled", f"line {line}")
            elif b'"error":{' in data:
                verdict.blame("failed", data.decode()[:200])
            elif line < last or data != self.result(line):
                verdict.blame("changed", f"{data.decode()[:200]} behind line {last}")
            last = line
        for line in range(1, self._lines.count + 1):
            if not seen[line]:
                verdict.blame("lost", f"line {line}")
        return verdict
