"""CLAIM, RECREATE, RESTORE, DISOWN: whose a job is. All of them run on the job's delivery shard.

An epoch is the time of its claim in Unix ms by Redis's clock, or one more than the epoch before it,
whichever is larger. So no two claims have the same, even where Redis came back without its last
moments: what was claimed in them had an epoch that no later claim gets. Hence, to a worker,

    another epoch, above its own     somebody claimed the job since: the worker is fenced
    another epoch, below its own     Redis lost the worker's claim; nobody claimed the job since

and an epoch and an index together name one token, wherever they are met again.

Redis's clock may go back by less than a crash takes. Where it goes back further, as on a replica
whose clock is wrong, a worker that had lost its job may take it once more; texts are still not
mixed, since appends and readers go by epochs, but readers wait for an end that they can tell.

CLAIM      KEYS job                  ARGV worker ID
           → {"missing"} | {"ended", epoch} | {"claimed", epoch, cancelled, epoch before, chunk…}
RECREATE   KEYS job, open            ARGV worker ID, job ID, job JSON, lease ms, deadline
           As CLAIM, but opens a log where there is none.
RESTORE    KEYS job, open            ARGV as RECREATE, then the epoch
           Puts a claim that Redis lost back, and the job with it where that is lost too. What is
           in the log is for the caller to compare with what it has.
           → as CLAIM | {"fenced", epoch} where the job has an epoch above it
DISOWN     KEYS job                  ARGV worker ID, "nobody"
           Where the newest claim of an open job is the worker's, claims it for nobody, so that the
           sweeper finds it and publishes it again. → {newest epoch, 1 disowned | 0}; the epoch is 0
           where there is no such job
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from openlora.joblog.scripts import JOB_STATE, Call, Script
from openlora.protocol import codec, names
from openlora.protocol.events import Chunk
from openlora.protocol.jobs import Job

NOBODY = "nobody"
"""In place of a worker's ID."""
RECREATED_LEASE_MS = 30_000
"""Lease of a log that was lost and opened anew: time for the job's gateway to renew it."""

_TAKE = (
    JOB_STATE
    + """
local function take(job, worker, wanted)
    local f = redis.call('HMGET', job, 'state', 'epoch', 'cancel', 'lease_until')
    if not f[1] then return {'missing'} end
    if f[1] ~= 'open' then return {'ended', tonumber(f[2] or 0)} end
    local now, before = now_ms(), tonumber(f[2])
    if wanted and before > wanted then return {'fenced', before} end
    local epoch = wanted or math.max(before + 1, now)
    local reply = redis.call('LRANGE', log_of(job, f[2]), 0, -1)
    if epoch > before then
        local base = 0
        if #reply > 0 then
            base = length_with(reply[#reply])
            redis.call('RENAME', log_of(job, f[2]), log_of(job, epoch))
        end
        redis.call('HSET', job, 'epoch', epoch, 'base', base, 'claimed_by', worker)
    end
    table.insert(reply, 1, before)
    table.insert(reply, 1, is_cancelled(f[3], f[4], now))
    table.insert(reply, 1, epoch)
    table.insert(reply, 1, 'claimed')
    return reply
end
"""
)

_TAKE_OR_OPEN = (
    _TAKE
    + """
local function take_or_open(job, open, wanted)
    local reply = take(job, ARGV[1], wanted)
    if reply[1] ~= 'missing' then return reply end
    local now = now_ms()
    local epoch = wanted or now
    redis.call('DEL', log_of(job, epoch))
    redis.call('HSET', job, 'job', ARGV[3], 'state', 'open', 'epoch', epoch, 'base', 0,
        'claimed_by', ARGV[1])
    if ARGV[4] ~= '0' then redis.call('HSET', job, 'lease_until', now + ARGV[4]) end
    if ARGV[5] ~= '0' then redis.call('HSET', job, 'deadline', ARGV[5]) end
    redis.call('ZADD', open, now, ARGV[2])
    return {'claimed', epoch, 0, 0}
end
"""
)

CLAIM = Script(_TAKE + "return take(KEYS[1], ARGV[1])")
RECREATE = Script(_TAKE_OR_OPEN + "return take_or_open(KEYS[1], KEYS[2])")
RESTORE = Script(_TAKE_OR_OPEN + "return take_or_open(KEYS[1], KEYS[2], tonumber(ARGV[6]))")
DISOWN = Script(
    _TAKE
    + """
local f = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'claimed_by')
if f[1] ~= 'open' or f[3] ~= ARGV[1] then return {tonumber(f[2] or 0), 0} end
return {take(KEYS[1], ARGV[2])[2], 1}
"""
)


class Claim(msgspec.Struct, frozen=True):
    """Answer to a worker that takes a job: go on after ``chunks`` at ``epoch``, or leave it.

    ``before``: the epoch that the job had; 0 where this is its first claim.
    """

    status: Literal["claimed", "ended", "missing", "fenced"]
    epoch: int = 0
    chunks: tuple[Chunk, ...] = ()
    cancelled: bool = False
    before: int = 0


class Newest(msgspec.Struct, frozen=True):
    """A job's newest claim, 0 where there is no such job; ``disowned``: it was ours until now."""

    epoch: int
    disowned: bool


def claim_call(job_id: str, worker_id: str) -> Call:
    """Take a job; ``decode_claim`` reads the reply."""
    return Call(CLAIM, [names.job_key(job_id)], [worker_id])


def recreate_call(job: Job, worker_id: str) -> Call:
    """Open a lost log anew, or claim it; ``decode_claim`` reads the reply."""
    return Call(RECREATE, _keys(job), _facts(job, worker_id))


def restore_call(job: Job, epoch: int, worker_id: str) -> Call:
    """Put a lost claim back; ``decode_claim`` reads the reply."""
    return Call(RESTORE, _keys(job), [*_facts(job, worker_id), epoch])


def disown_call(job_id: str, worker_id: str) -> Call:
    """Leave a job to nobody, if it is the worker's; ``decode_newest`` reads the reply."""
    return Call(DISOWN, [names.job_key(job_id)], [worker_id, NOBODY])


def decode_newest(reply: Sequence[int]) -> Newest:
    """The reply of DISOWN."""
    return Newest(reply[0], reply[1] == 1)


def _keys(job: Job) -> list[str]:
    return [names.job_key(job.job_id), names.open_jobs_key(names.shard_of(job.job_id))]


def _facts(job: Job, worker_id: str) -> list[bytes | str | int]:
    lease_ms = RECREATED_LEASE_MS if job.leased else 0
    return [worker_id, job.job_id, codec.encode(job), lease_ms, job.deadline_ms or 0]


def decode_claim(reply: Sequence[Any]) -> Claim:
    """The reply of CLAIM, RECREATE and RESTORE."""
    status = reply[0].decode()
    if status == "claimed":
        chunks = tuple(map(codec.decode_chunk, reply[4:]))
        return Claim("claimed", reply[1], chunks, bool(reply[2]), reply[3])
    return Claim(status, *reply[1:])
