"""Frame writers that stand in for a client's socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gateway.joint_writes import Write


class Socket:
    """Takes frames while ``takes_frames``; ``on_frame`` hears of each."""

    def __init__(
        self, *, takes_frames: bool = True, on_frame: Callable[[str], None] = lambda frame: None
    ) -> None:
        self.takes_frames = takes_frames
        self.writes: list[list[str]] = []
        self._on_frame = on_frame

    async def drain(self) -> None:
        while not self.takes_frames:
            await asyncio.sleep(0.001)

    def write_frames(self, texts: Sequence[str]) -> None:
        self.writes.append([*texts])
        for text in texts:
            self._on_frame(text)

    def gather_frames(self, texts: Sequence[str], writes: list[Write]) -> bool:
        if self.takes_frames:
            self.write_frames(texts)
        return self.takes_frames

    @property
    def frames(self) -> list[str]:
        """All that was written."""
        return [frame for write in self.writes for frame in write]


def full_socket() -> Socket:
    """One whose client does not read."""
    return Socket(takes_frames=False)
