"""What one job's log does, in Python: the scripts in Redis are compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from openlora.joblog import AppendResult, Claim
from openlora.protocol.events import Chunk
from openlora.protocol.jobs import Job


@dataclass
class ModelJob:
    """One job as the header of scripts.py says it behaves."""

    job: Job
    state: str = "open"
    epoch: int = 0
    base: int = 0
    cancelled: bool = False
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    def claim(self, epoch: int) -> Claim:
        """By a claim that was given ``epoch``, which must be a new one."""
        if self.state != "open":
            return Claim("ended", self.epoch)
        assert epoch > self.epoch
        return self._take(epoch)

    def restore(self, epoch: int) -> Claim:
        if self.state != "open":
            return Claim("ended", self.epoch)
        if epoch < self.epoch:
            return Claim("fenced", self.epoch)
        return self._take(epoch)

    def _take(self, epoch: int) -> Claim:
        before, self.epoch = self.epoch, epoch
        if epoch > before:
            self.base = self.length
        return Claim("claimed", epoch, tuple(self.chunks), self.cancelled, before)

    def append(self, chunk: Chunk) -> tuple[AppendResult, bool]:
        """The answer, and whether the chunk is logged and published."""
        is_new = False
        end = chunk.first_index + len(chunk.tokens)
        if self.state == "discarded":
            return AppendResult("gone", 0, False, 0), False
        if chunk.epoch != self.epoch:
            status = "fenced" if self.epoch > chunk.epoch else "unclaimed"
        elif not chunk.tokens and chunk.end is None and not chunk.restarted:
            status = "taken"
        elif self.state == "open" and chunk.first_index == self.length:
            status, is_new = "taken", True
            self.chunks.append(chunk)
            if chunk.end is not None:
                self.state = "ended"
        elif self.base <= chunk.first_index and end <= self.length:
            is_late_end = chunk.end is not None and self.state == "open"
            status = "gap" if is_late_end else "taken"
        else:
            status = "gap"
        return AppendResult(status, self.length, self.cancelled, len(self.chunks)), is_new
