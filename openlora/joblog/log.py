"""``JobLog``: the worker's side of the job log, blocking; safe for use by several threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import redis

from openlora.joblog import core
from openlora.joblog.append import AppendResult, append_calls, decode_append
from openlora.joblog.claim import (
    Claim,
    Newest,
    claim_call,
    decode_claim,
    decode_newest,
    disown_call,
    recreate_call,
    restore_call,
)
from openlora.joblog.clients import redis_errors
from openlora.joblog.script_channel import ScriptChannel
from openlora.joblog.scripts import Call
from openlora.protocol import codec, names
from openlora.protocol.events import Chunk
from openlora.protocol.jobs import Job
from openlora.protocol.status import Heartbeat


class JobLog:
    """Claims, appends and heartbeats over one Redis client (``redis_client(url)``).

    Every method may raise ``Overloaded`` when Redis does not answer; calling it again is safe.
    ``keep_ended_s``: how long the logs of retired jobs stay.
    """

    def __init__(self, client: redis.Redis, keep_ended_s: int = core.RETIRED_TTL_S) -> None:
        self._redis: Any = client  # redis-py's annotations leave replies open
        self._channel = ScriptChannel(client)
        self._keep_ended_s = keep_ended_s

    def claim(self, job_ids: Sequence[str], worker_id: str) -> list[Claim]:
        """Take jobs, in one round trip: each at an epoch that fences whoever had it before."""
        replies = self._run([claim_call(job_id, worker_id) for job_id in job_ids])
        return [decode_claim(reply) for reply in replies]

    def recreate(self, job: Job, worker_id: str) -> Claim:
        """Take a job, and open its log where Redis lost it.

        Only the present owner of the job's partition may do this. The first chunk it appends to
        an empty log carries ``restarted``. Lost cancel marks stay lost; a leased job gets 30 s for
        its gateway to renew.
        """
        return decode_claim(self._run([recreate_call(job, worker_id)])[0])

    def restore(self, job: Job, epoch: int, worker_id: str) -> Claim:
        """Put back the claim of ``epoch``, which Redis lost, maybe with all of the job.

        Whoever made it may do so, also where its partition has moved: the broker may have lost the
        job's message as well. "fenced": somebody claimed the job later. The log may hold less than
        the caller logged, or what a worker fenced by the lost claim appended since.
        """
        return decode_claim(self._run([restore_call(job, epoch, worker_id)])[0])

    def disown(self, job_ids: Sequence[str], worker_id: str) -> list[Newest]:
        """Claim for nobody those jobs whose newest claim is the worker's; → their newest claims."""
        replies = self._run([disown_call(job_id, worker_id) for job_id in job_ids])
        return [decode_newest(reply) for reply in replies]

    def append(self, chunks: Sequence[Chunk]) -> list[AppendResult]:
        """Log and publish, one atomic call per delivery shard, all sent together.

        Answers in the order of ``chunks``; each stands for itself. A chunk without tokens, end and
        ``restarted`` is a probe: it is checked and answered, and nothing is written.
        """
        (results,) = self._append([(chunks, None)])
        return [results[position] for position in range(len(chunks))]

    def extend(
        self, parts: Iterable[tuple[Sequence[Chunk], Sequence[int]]]
    ) -> list[dict[int, AppendResult]]:
        """As ``append``, for a caller that knows how many chunks each log holds (``ASK``: it does
        not, or wants to hear of cancels and leases).

        ``parts``: chunks and entries of each; a part is sent once it is there, while the next is
        still being made. Answers are by position in the part's chunks; one without an answer was
        taken, and its log has one entry more. Much cheaper than ``append``, and a cancel is always
        answered; a lease that ran out is not, so ask now and then.
        """
        return self._append(parts)

    def _append(
        self, parts: Iterable[tuple[Sequence[Chunk], Sequence[int] | None]]
    ) -> list[dict[int, AppendResult]]:
        positions: list[list[list[int]]] = []

        def calls() -> Iterator[list[Call]]:
            for chunks, entries in parts:
                made = append_calls(chunks, entries)
                positions.append([where for where, _ in made])
                yield [call for _, call in made]

        replies = iter(self._run_in_parts(calls()))
        return [
            {
                where[position]: result
                for where in wheres
                for position, result in decode_append(next(replies)).items()
            }
            for wheres in positions
        ]

    def retire(self, job_ids: Sequence[str]) -> None:
        """The offsets of these jobs are committed: their logs are kept for ``keep_ended_s`` now."""
        self._run([core.retire_call(job_id, self._keep_ended_s) for job_id in job_ids])

    def write_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Show this worker to all for the next 5 s."""
        with redis_errors(self._redis), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.sadd(names.WORKERS_KEY, heartbeat.id)
            key = names.worker_key(heartbeat.id)
            pipeline.set(key, codec.encode(heartbeat), ex=core.HEARTBEAT_TTL_S)
            pipeline.execute()

    def heartbeats(self) -> list[Heartbeat]:
        """Of all workers that live, by ID."""
        with redis_errors(self._redis):
            members = sorted(self._redis.smembers(names.WORKERS_KEY))
            keys = [names.worker_key(member.decode()) for member in members]
            values = self._redis.mget(keys) if keys else []
        return core.decode_heartbeats(values)

    def remove_heartbeat(self, worker_id: str) -> None:
        """The worker leaves on purpose."""
        with redis_errors(self._redis), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.srem(names.WORKERS_KEY, worker_id)
            pipeline.delete(names.worker_key(worker_id))
            pipeline.execute()

    def _run(self, calls: Sequence[Call]) -> list[Any]:
        return self._run_in_parts([calls]) if calls else []

    def _run_in_parts(self, parts: Iterable[Sequence[Call]]) -> list[Any]:
        calls: list[Call] = []

        def noted() -> Iterator[Sequence[Call]]:
            for part in parts:
                calls.extend(part)
                yield part

        with redis_errors(self._redis):
            replies = self._channel.run_in_parts(noted())
            lost = core.without_script(replies)
            if lost:  # Redis is new or was restarted
                for script in {calls[i].script for i in lost}:
                    self._redis.script_load(script.source)
                again = self._channel.run([calls[i] for i in lost])
                for i, reply in zip(lost, again, strict=True):
                    replies[i] = reply
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return replies
