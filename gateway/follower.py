"""Hop 8, towards the client: a connection's bounded outbox and the streams that write to it.

A slow client fills its outbox; from then on its streams *lag*: events are dropped, not queued, and
once the outbox has drained the connection's sender reads what is missing from the jobs' logs. So
a client costs a bounded amount of memory, loses nothing, and holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.joint_writes import Write
from gateway.metrics import Metrics
from gateway.stream import TokenStream
from openlora.joblog import JobView
from openlora.protocol.events import Chunk

MAX_QUEUED_FRAMES = 1024
MAX_HELD_CHUNKS = 64
"""Events of a stream that wait for `accepted`, or for its log to be read, before they are dropped
(and the log read once more)."""

_FLOWING, _HOLDING, _DROPPING = range(3)


class FrameWriter(Protocol):
    """Writes a connection's text frames to its socket."""

    @property
    def takes_frames(self) -> bool:
        """Whether frames written now go out soon: the socket's buffer is not full."""

    async def drain(self) -> None:
        """Returns once frames are taken, or nobody is there any more to take them."""

    def write_frames(self, texts: Sequence[str]) -> None:
        """Sends ``texts`` together; never blocks. Drops them where the connection is closed."""

    def gather_frames(self, texts: Sequence[str], writes: list[Write]) -> bool:
        """As ``write_frames``, but maybe by ``write_all(writes)``, which the caller calls next;
        False, and nothing sent, where it does not take frames."""


class Outbox:
    """Frames that wait for one connection.

    Relay and session append to ``frames`` and call ``flush``. As long as the client keeps up they
    are written there and then, all that are there at once. What its socket does not take waits for
    the connection's sender task; at most 2 × ``MAX_QUEUED_FRAMES`` and one chunk's frames are held.
    """

    __slots__ = ("_metrics", "_reader", "_waiter", "_writer", "closed", "frames", "lagging")

    def __init__(self, writer: FrameWriter, metrics: Metrics) -> None:
        self.frames: list[str] = []
        # an ordered set: first come, first filled up
        self.lagging: dict[Follower, None] = {}
        self.closed = False
        self._writer = writer
        self._metrics = metrics
        # set while the sender waits
        self._waiter: asyncio.Future[None] | None = None
        self._reader: asyncio.Future[None] | None = None

    @property
    def full(self) -> bool:
        """Whether token frames have to wait for the sender."""
        return len(self.frames) >= MAX_QUEUED_FRAMES

    def put(self, frame: str) -> None:
        """Sends a frame that is not part of a token stream."""
        self.frames.append(frame)
        self.flush()

    def flush(self, writes: list[Write] | None = None) -> None:
        """Writes the frames, or leaves them to the sender where that must not be.

        ``writes``: what is written together with other connections' frames, see
        ``FrameWriter.gather_frames``; None: by itself.
        """
        frames = self.frames
        writer = self._writer
        # Without a waiter the sender has frames in hand, which come first.
        if (
            frames
            and self._waiter is not None
            and (writer.takes_frames if writes is None else writer.gather_frames(frames, writes))
        ):
            if writes is None:
                writer.write_frames(frames)
            self._metrics.frames_sent += len(frames)
            frames.clear()
            if self._reader is not None:
                self._has_room()
        else:
            self.wake()

    def wake(self) -> None:
        """Tells the sender that there is something to do."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def close(self) -> None:
        """No more work: ``wait`` returns from now on."""
        self.closed = True
        self.wake()

    async def wait(self) -> None:
        """Returns once there are frames, or lagging streams, or the outbox is closed."""
        while not (self.frames or self.lagging or self.closed):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def send(self) -> None:
        """Writes the frames as soon as the socket takes them: the sender's part."""
        await self._writer.drain()
        self._metrics.frames_sent += len(self.frames)
        self._writer.write_frames(self.take())

    def take(self) -> list[str]:
        """All queued frames; the queue is empty afterwards."""
        frames, self.frames = self.frames, []
        self._has_room()
        return frames

    def _has_room(self) -> None:
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def room(self) -> None:
        """Returns once the outbox is not full."""
        while self.full and not self.closed:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader


class Follower:
    """One client stream following one job.

    Events *flow* to the client; are *held* until they may follow what comes first (`accepted`,
    or what the log is being read for); or are *dropped* while a slow client's outbox drains.

    Attributes:
        finish: called by the relay when the last frame is in the outbox.
        cancelled: its client asked to cancel the job.
        leased: the job lives as long as somebody follows it.
        missed: an event was dropped since the log was last read.
        log_lost_at: since when there has been no log (monotonic); None while there is one.
    """

    __slots__ = (
        "_held",
        "_metrics",
        "_state",
        "cancelled",
        "finish",
        "leased",
        "log_lost_at",
        "missed",
        "outbox",
        "stream",
    )

    def __init__(
        self,
        stream: TokenStream,
        outbox: Outbox,
        metrics: Metrics,
        finish: Callable[[], None],
    ) -> None:
        self.stream = stream
        self.finish = finish
        self.outbox = outbox
        self.cancelled = False
        self.leased = False
        self.missed = False
        self.log_lost_at: float | None = None
        # Nothing may overtake `accepted`: events wait until `begin`.
        self._state = _HOLDING
        self._held: list[Chunk] = []
        self._metrics = metrics

    def begin(self) -> bool:
        """``accepted`` is queued: events may follow it; True where the stream ended with them."""
        return self._flow_on()

    def miss(self) -> None:
        """Events were lost on the way: the log knows them."""
        self.missed = True
        if self._state == _FLOWING:
            self.lag()

    def lag(self) -> None:
        """From now on the log is what counts, until the sender has read it."""
        self._state = _DROPPING
        self._held.clear()
        self.outbox.lagging[self] = None
        self.outbox.wake()

    def begin_read(self) -> None:
        """The log is read now: what comes meanwhile may be lacking there, and is kept."""
        self.missed = False
        self._state = _HOLDING

    def take(self, chunk: Chunk) -> bool:
        """An event from the shard's channel; True where it was the stream's last.

        Its frames are in the outbox then, which the caller flushes.
        """
        if self._state != _FLOWING:
            self._keep(chunk)
            return False
        frames = self.outbox.frames
        if len(frames) >= MAX_QUEUED_FRAMES:
            self.outbox.flush()  # empties this very list
            if len(frames) >= MAX_QUEUED_FRAMES:
                return self._drop()
        stream = self.stream
        if not stream.feed(chunk, frames):
            return self._drop()
        return stream.end is not None

    def _drop(self) -> bool:
        self._metrics.events_dropped.inc()
        self.lag()
        return False

    def _keep(self, chunk: Chunk) -> None:
        if self._state == _HOLDING and len(self._held) < MAX_HELD_CHUNKS and not self.missed:
            self._held.append(chunk)
        else:
            self.missed = True
            self._held.clear()
            self._metrics.events_dropped.inc()

    def _flow_on(self) -> bool:
        """Lets go of what was held; True where that ended the stream."""
        if self.missed:
            self.lag()
            return False
        self._state = _FLOWING
        held, self._held = self._held, []
        for chunk in held:
            self.take(chunk)
        self.outbox.flush()
        return self.stream.end is not None

    def catch_up(self, view: JobView | None, *, whole: bool) -> bool:
        """Takes what the log holds (``whole``: from its first chunk); True at the stream's end.

        Stops where the outbox is full, to be called again when it has drained.
        """
        if view is not None:
            self.log_lost_at = None
            before = self.stream.next_index
            if whole:
                self.stream.meet_log(view.epoch, view.chunks, self.outbox.frames)
            for chunk in view.chunks:
                if self.outbox.full:
                    self.lag()
                    return False
                self.stream.feed_logged(chunk, self.outbox.frames)
            self._metrics.tokens_refilled.inc(max(0, self.stream.next_index - before))
        # A lost log is opened anew by the job's worker; its first event says so.
        return self._flow_on() or self.stream.end is not None
