"""One websocket: the session's actions carried out, and the sender of its outbox.

Two tasks a connection, one per request while it is being accepted, none per token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any

from starlette.types import Receive

from gateway.auth import KeyPolicy
from gateway.follower import Follower, FrameWriter, Outbox
from gateway.frames import accepted_frame, error_frame
from gateway.intake import Intake
from gateway.metrics import Metrics
from gateway.relay import Relay
from gateway.session import MAX_LIVE_REQUESTS, Action, Cancel, Resume, Session, Submit
from gateway.session import Send as SendAction
from gateway.stream import TokenStream
from openlora.errors import InternalError, InvalidRequest, JobNotFound, OpenLoRAError, Overloaded
from openlora.joblog import AsyncJobLog, JobView
from openlora.protocol.jobs import Job

log = logging.getLogger(__name__)

MAX_TASKS = 2 * MAX_LIVE_REQUESTS
"""Requests being accepted and cancels being marked; beyond it the socket is not read."""

CANCEL_RETRY_S = 0.5
RESUME_RETRY_S = 0.5


class Connection:
    """Runs one accepted websocket until it is closed by either side."""

    def __init__(
        self,
        receive: Receive,
        writer: FrameWriter,
        *,
        tenant: str,
        policy: KeyPolicy,
        job_log: AsyncJobLog,
        intake: Intake,
        relay: Relay,
        metrics: Metrics,
    ) -> None:
        self._receive = receive
        self._tenant = tenant
        self._policy = policy
        self._log = job_log
        self._intake = intake
        self._relay = relay
        self._metrics = metrics
        self._session = Session()
        self._outbox = Outbox(writer, metrics)
        self._followers: dict[str, Follower] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending_since: float | None = None
        self._abandoned = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Returns when the connection is closed; its jobs then have one lease time left."""
        self._metrics.connections.inc()
        sender = asyncio.create_task(self._send_frames())
        receiver = asyncio.create_task(self._receive_frames())
        try:
            waits = (sender, receiver, self._abandoned)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in (receiver, sender):
                if task.done() and (error := task.exception()):
                    raise error
        finally:
            receiver.cancel()
            sender.cancel()
            self._metrics.connections.dec()
            await self._leave()

    def stalled_s(self) -> float:
        """For how long the client has not taken what is being sent to it."""
        return 0.0 if self._sending_since is None else time.monotonic() - self._sending_since

    def abandon(self) -> None:
        """Ends ``run`` although the client says nothing."""
        if not self._abandoned.done():
            self._abandoned.set_result(None)

    async def _receive_frames(self) -> None:
        while True:
            # a client that sends and never reads gets no further than its outbox
            await self._outbox.room()
            if len(self._tasks) >= MAX_TASKS:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return
            self._metrics.frames_received += 1
            text = message.get("text")
            if text is not None:
                self._perform(self._session.receive_text(text))
            else:
                self._perform(self._session.receive_bytes(len(message["bytes"])))

    async def _send_frames(self) -> None:
        outbox = self._outbox
        while True:
            await outbox.wait()
            if outbox.frames:
                self._sending_since = time.monotonic()
                await outbox.send()
            self._sending_since = None
            if outbox.lagging and not outbox.frames:
                follower = next(iter(outbox.lagging))
                del outbox.lagging[follower]
                await self._relay.refill(follower)

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendAction(frame):
                    self._outbox.put(frame)
                case Submit(request_id, _):
                    self._spawn(request_id, self._submit(action))
                case Resume(request_id, job_id, after, epoch):
                    self._spawn(request_id, self._resume(request_id, job_id, after, epoch))
                case Cancel(request_id, job_id):
                    self._spawn(request_id, self._cancel(request_id, job_id))

    def _spawn(self, request_id: str | None, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._work_done, request_id))

    def _work_done(self, request_id: str | None, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if not isinstance(error, OpenLoRAError):
            log.error("request %s failed", request_id, exc_info=error)
            error = InternalError("the gateway failed on this request; its log has the details")
        self._metrics.jobs.labels(error.code).inc()
        if request_id in self._session.live:
            self._drop(request_id)
            self._perform(self._session.failed(request_id, error))
        else:
            self._outbox.put(error_frame(error, request_id))

    async def _submit(self, action: Submit) -> None:
        request_id, draft = action.request_id, action.draft
        job = await self._intake.prepare(draft, self._tenant, self._policy)
        if self._outbox.closed:
            return
        follower = await self._follow(request_id, job.job_id, 0)
        follower.leased = job.leased
        job_id = await self._intake.commit(job, draft)
        if job_id == job.job_id:
            self._accept(follower, job)
            if follower.begin():
                follower.finish()
        else:
            self._drop(request_id)
            await self._resume(request_id, job_id, -1)

    async def _resume(self, request_id: str, job_id: str, after: int, epoch: int = 0) -> None:
        # subscribed before the log is read: nothing can fall between the two
        follower = await self._follow(request_id, job_id, after + 1, epoch)
        follower.begin_read()
        view = await self._log.read(job_id)
        while view is None and self._relay.logs_may_return and not self._outbox.closed:
            await asyncio.sleep(RESUME_RETRY_S)
            view = await self._log.read(job_id)
        if view is None or view.job.tenant != self._tenant:
            raise JobNotFound(f"job {job_id!r} is not known; it never was, or its log has expired")
        # who knows the epoch is told by the log what became of its tokens
        is_beyond = not epoch and _is_beyond(view, after)
        if is_beyond and not self._relay.logs_may_return:
            raise InvalidRequest(
                f"after is {after}, but the job has no token of that index; send the index of the "
                "last token received"
            )
        follower.leased = view.job.leased
        if follower.leased:
            # what the gateway that lost the client left of the lease may be over in a moment
            await self._relay.renew([job_id])
        self._accept(follower, view.job)
        if is_beyond:  # Redis lost its last moments: whoever makes these tokens may make others
            follower.stream.restart(self._outbox.frames)
        if follower.catch_up(view, whole=True):
            follower.finish()

    async def _cancel(self, request_id: str, job_id: str) -> None:
        """Marks the job; while Redis is away, again and again for as long as the request lives."""
        if request_id in self._followers:
            self._followers[request_id].cancelled = True
        while True:
            try:
                await self._log.cancel(job_id)
            except Overloaded as error:
                log.warning("job %s: cancel not marked yet: %s", job_id, error.message)
            else:
                return
            await asyncio.sleep(CANCEL_RETRY_S)
            if self._outbox.closed or self._session.live.get(request_id) != job_id:
                return

    async def _follow(self, request_id: str, job_id: str, index: int, epoch: int = 0) -> Follower:
        follower = Follower(
            TokenStream(request_id, job_id, index, epoch),
            self._outbox,
            self._metrics,
            partial(self._finish, request_id),
        )
        if not self._outbox.closed:
            self._followers[request_id] = follower
            await self._relay.follow(follower)
        return follower

    def _accept(self, follower: Follower, job: Job) -> None:
        request_id = follower.stream.request_id
        self._outbox.put(accepted_frame(request_id, job.job_id, job.adapters))
        self._perform(self._session.started(request_id, job.job_id))

    def _finish(self, request_id: str) -> None:
        """The last frame of the stream is in the outbox."""
        follower = self._followers.get(request_id)
        if follower is None:  # the client left while its log was being read
            return
        end = follower.stream.end
        self._drop(request_id)
        self._session.ended(request_id)
        if end is not None:
            outcome = end.finish_reason if end.failure is None else end.failure.code
            self._metrics.jobs.labels(outcome).inc()
            if end.completion_tokens:
                self._metrics.ttft.observe(end.ttft_ms / 1000)

    def _drop(self, request_id: str) -> None:
        follower = self._followers.pop(request_id, None)
        if follower is not None:
            self._relay.unfollow(follower)

    async def _leave(self) -> None:
        """The client is gone: its jobs get one last lease, the time it has to come back."""
        self._outbox.close()
        leased = [f.stream.job_id for f in self._followers.values() if f.leased]
        for request_id in [*self._followers]:
            self._drop(request_id)
        await self._relay.renew(leased)


def _is_beyond(view: JobView, after: int) -> bool:
    """Whether a log that was never lost does not hold the index yet."""
    if not view.chunks or view.chunks[0].restarted:
        return False
    last = view.chunks[-1]
    return after >= last.first_index + len(last.tokens)
