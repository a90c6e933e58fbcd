"""The job log of one job in a few lines: what the Lua scripts promise, without Redis.

Frozen and hashable, so that a search can hold thousands of them. ``test_log_model.py`` runs it
beside the real scripts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Chunk = tuple[int, int, int, bool, bool]
"""(epoch, first index, tokens, is the end, restarted)."""


@dataclass(frozen=True)
class LogModel:
    """``epoch`` None: Redis has no such job. ``chunks``: as appended."""

    epoch: int | None = 0
    base: int = 0
    ended: bool = False
    chunks: tuple[Chunk, ...] = ()

    @property
    def length(self) -> int:
        return sum(chunk[2] for chunk in self.chunks)

    def claim(self, above: int = 0) -> tuple[LogModel, str]:
        """→ what the worker hears: claimed, ended, missing."""
        if self.epoch is None:
            return self, "missing"
        if self.ended:
            return self, "ended"
        return replace(self, epoch=max(self.epoch, above) + 1, base=self.length), "claimed"

    def recreate(self, above: int) -> tuple[LogModel, str]:
        """A claim, of a log that is opened where there is none."""
        if self.epoch is None:
            return LogModel(epoch=above + 1), "claimed"
        return self.claim(above)

    def append(self, chunk: Chunk) -> tuple[LogModel, str]:
        """→ taken, fenced, gone, gap."""
        epoch, first, count, is_end, is_restart = chunk
        if self.epoch is None:
            return self, "gone"
        if self.epoch != epoch:
            return self, "fenced"
        if count == 0 and not is_end and not is_restart:
            return self, "taken"
        if not self.ended and first == self.length:
            return replace(self, chunks=(*self.chunks, chunk), ended=is_end), "taken"
        if self.base <= first and first + count <= self.length and (not is_end or self.ended):
            return self, "taken"
        return self, "gap"
