"""Hop 8, from Redis: one subscription for the whole gateway, each event to the streams it concerns.

A message is decoded once, whoever follows the jobs in it. A gateway holds one shard for the jobs
it accepts, and others for as long as somebody resumes a job there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Iterable
from contextlib import suppress

from gateway.follower import Follower, Outbox
from gateway.joint_writes import Write, write_all
from gateway.metrics import Metrics
from openlora.errors import JobNotFound, Overloaded
from openlora.joblog import AsyncJobLog
from openlora.protocol.events import Chunk, End, Failure
from openlora.protocol.names import shard_of

log = logging.getLogger(__name__)

SUBSCRIBE_TIMEOUT_S = 5.0
RETRY_AFTER_MS = 1000
_LOG_RETRY_S = 0.5
_LOST_LOG_RETRY_S = 5.0
RESUME_PATIENCE_S = 60.0
"""How long behind a reconnect to Redis a resume waits for a log that is not there."""
LOST_LOG_PATIENCE_S = 300.0
"""A log that Redis lost is opened anew when a worker comes to the job. Of one that had ended, or
that the broker lost too, nothing will ever come: its stream must not wait for ever."""


class Relay:
    """Streams by job.

    Every method runs on the event loop; ``run`` and ``renew_leases`` are the gateway's two tasks.
    """

    def __init__(self, job_log: AsyncJobLog, shard: int, lease_ms: int, metrics: Metrics) -> None:
        self._log = job_log
        self._own_shard = shard
        self._lease_ms = lease_ms
        self._metrics = metrics
        self._events = job_log.events([shard])
        self._followers: dict[str, tuple[Follower, ...]] = {}
        self._filled: set[Outbox] = set()
        self._shards: set[int] = set()
        self._reconnected_at = -math.inf
        self._renewal_due = asyncio.Event()

    @property
    def logs_may_return(self) -> bool:
        """Whether Redis was away a moment ago: without its data, workers open running jobs' logs
        anew, which takes until they have tokens for them, or have their partitions."""
        return time.monotonic() - self._reconnected_at < RESUME_PATIENCE_S

    async def run(self) -> None:
        """Relays events until cancelled."""
        async for chunks in self._events:
            if chunks is None:
                self._reconnected_at = time.monotonic()
                self._metrics.reconnects.inc()
                log.warning("event subscription re-established; all streams read their logs")
                self._all_lag()
                self._renewal_due.set()
            else:
                self.dispatch(chunks)

    def dispatch(self, chunks: Iterable[Chunk]) -> None:
        """Hands each chunk to the followers of its job.

        Their frames are written once nothing more waits to be read from Redis: behind its time,
        the gateway writes several steps of a stream together.
        """
        filled = self._filled
        if not filled:
            asyncio.get_running_loop().call_soon(self._flush)
        followers_of = self._followers.get
        for chunk in chunks:
            for follower in followers_of(chunk.job_id, ()):
                filled.add(follower.outbox)
                if follower.take(chunk):
                    follower.finish()

    def _flush(self) -> None:
        filled, self._filled = self._filled, set()
        writes: list[Write] = []
        for outbox in filled:
            outbox.flush(writes)
        if writes:
            write_all(writes)

    async def follow(self, follower: Follower) -> None:
        """Starts ``follower`` (events wait for its ``begin``); its shard is subscribed on return.

        Raises:
            Overloaded: Redis does not answer.
        """
        job_id = follower.stream.job_id
        self._followers[job_id] = (*self._followers.get(job_id, ()), follower)
        self._metrics.streams.inc()
        shard = shard_of(job_id)
        if shard not in self._shards:
            try:
                await asyncio.wait_for(self._events.add(shard), SUBSCRIBE_TIMEOUT_S)
            except TimeoutError as error:
                self.unfollow(follower)
                raise Overloaded(
                    "Redis does not answer; try again", retry_after_ms=RETRY_AFTER_MS
                ) from error
            self._shards.add(shard)

    def unfollow(self, follower: Follower) -> None:
        """Ends ``follower``. Calling it again does nothing."""
        job_id = follower.stream.job_id
        followers = self._followers.get(job_id, ())
        if follower not in followers:
            return
        if len(followers) == 1:
            del self._followers[job_id]
        else:
            self._followers[job_id] = tuple(f for f in followers if f is not follower)
        follower.outbox.lagging.pop(follower, None)
        self._metrics.streams.dec()

    async def refill(self, follower: Follower) -> None:
        """Reads the job's log for a lagging stream.

        Only the tail is read, unless another claim took over since: then the whole log tells
        whether it is still the one that the stream was in.
        """
        stream = follower.stream
        follower.begin_read()
        self._metrics.log_reads.inc()
        try:
            view = await self._log.read(stream.job_id, after=stream.next_index - 1)
            whole = stream.next_index == 0
            if view is not None and not whole and view.epoch != stream.epoch:
                view = await self._log.read(stream.job_id, after=-1)
                whole = True
        except Overloaded as error:
            log.warning("job %s: log not read, tried again soon: %s", stream.job_id, error)
            asyncio.get_running_loop().call_later(_LOG_RETRY_S, self._lag_again, follower)
            return
        if follower.catch_up(view, whole=whole) or (view is None and self._gives_up(follower)):
            follower.finish()

    def _gives_up(self, follower: Follower) -> bool:
        """There is no log: looks again later, or ends the stream where that went on too long."""
        now = time.monotonic()
        if follower.log_lost_at is None:
            follower.log_lost_at = now
        if now - follower.log_lost_at < LOST_LOG_PATIENCE_S:
            asyncio.get_running_loop().call_later(_LOST_LOG_RETRY_S, self._lag_again, follower)
            return False
        stream = follower.stream
        message = "the job's log was lost, and no worker has opened it again; send the request anew"
        failure = Failure(JobNotFound.code, message, JobNotFound.retriable)
        end = Chunk(stream.job_id, stream.epoch, stream.next_index, end=End(failure=failure))
        stream.feed_logged(end, follower.outbox.frames)
        follower.outbox.flush()
        return True

    async def renew_leases(self) -> None:
        """Renews the leases of all followed jobs, three times per lease, until cancelled.

        At once behind a reconnect: leases run on while Redis is away. Cancels are marked again
        with them, in case Redis lost the mark.
        """
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._renewal_due.wait(), self._lease_ms / 3000)
            self._renewal_due.clear()
            await self._cancel_again()
            await self.renew(
                job_id
                for job_id, followers in self._followers.items()
                if any(follower.leased for follower in followers)
            )
            await self._leave_idle_shards()

    async def _cancel_again(self) -> None:
        followers = itertools.chain.from_iterable(self._followers.values())
        for job_id in {f.stream.job_id for f in followers if f.cancelled}:
            try:
                await self._log.cancel(job_id)
            except Overloaded as error:
                log.warning("job %s: cancel not marked, tried again: %s", job_id, error.message)
                return  # nor would the others be, and leases wait behind this

    async def renew(self, job_ids: Iterable[str]) -> None:
        """Gives ``job_ids`` a full lease from now on."""
        wanted = list(job_ids)
        if not wanted:
            return
        try:
            await self._log.renew_leases(wanted, self._lease_ms)
        except Overloaded as error:
            log.warning("leases of %d jobs not renewed, tried again soon: %s", len(wanted), error)

    @property
    def live_streams(self) -> int:
        """Number of streams that have not ended."""
        return sum(map(len, self._followers.values()))

    async def _leave_idle_shards(self) -> None:
        """A subscription made for a resume stays a while, for the client's next one."""
        for shard in self._shards - {self._own_shard}:
            # looked at anew for each: while one is being left, a client may resume on the next
            if any(shard_of(job_id) == shard for job_id in self._followers):
                continue
            self._shards.discard(shard)
            try:
                await self._events.remove(shard)
            except Overloaded as error:
                log.warning("delivery shard %d not left: %s", shard, error)

    def _all_lag(self) -> None:
        for followers in self._followers.values():
            for follower in followers:
                follower.miss()

    def _lag_again(self, follower: Follower) -> None:
        if follower in self._followers.get(follower.stream.job_id, ()):
            follower.lag()
