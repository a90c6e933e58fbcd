"""The Lua scripts of the job log, each with its contract. All of them run on one delivery shard.

A job has a hash, ``job``, and a log: a list of ``Chunk`` as JSON, oldest first, whose key is the
hash's key with the epoch behind it (``names.log_key``). Scripts are given the hash's key alone and
find the log's, which is in the same slot. Fields of the hash:

    job          the ``Job`` as JSON
    state        open | ended | discarded
    epoch        the newest claim's, see claim.py; 0 until the first one
    base         tokens in the log at the newest claim: what is before it is an older epoch's
    cancel       present once somebody asked to cancel
    lease_until  Redis's clock in ms; absent: the job needs nobody who watches
    deadline     Unix ms; absent: none. Workers keep to the job's own; this is for the sweeper
    published    topic:partition:offset, once the broker acknowledged it
    claimed_by   worker ID of the newest claim

Times are Redis's own (``TIME``), so that the clocks of gateways and workers do not matter. A job
is ``cancelled`` when it has a cancel mark or its lease ran out. Open jobs never expire.

Every script may be sent again after a lost reply:

STORE      KEYS job, open            ARGV job ID, job JSON, lease ms (0: none), deadline (0: none)
           A job that exists stays as it is. → 1 stored, 0 existed
PUBLISHED  KEYS job                  ARGV topic:partition:offset
           Nothing happens to a job that is gone. → 1 | 0
DISCARD    KEYS job, cancels, open   ARGV job ID, seconds to keep the tombstone
           The job will not run: claims say "ended", appends "gone", reads find nothing. → 1
CLAIM, RECREATE, RESTORE, DISOWN   see claim.py
APPEND     see append.py
RETIRE     KEYS job                  ARGV seconds
           Shortens the life of an ended job. → 1 | 0
CANCEL     KEYS job, cancels
           Marks an open job; its worker learns it from the next append or claim. → 1 marked,
           0 not open
RENEW      KEYS job1, …              ARGV lease ms
           Open jobs that have a lease get a new one. → number renewed
READ       KEYS job                  ARGV index
           The chunks that hold an index above it, and maybe some before them; of a log that was
           restarted all. → {} | {job JSON, epoch, cancelled, chunk…}
ONCE       KEYS key                  ARGV value, seconds to live
           The first value wins. → {value that won}
RELEASE    KEYS key                  ARGV start of the value
           Deletes the key if its value starts so. → 1 | 0
LEAD       KEYS key                  ARGV owner, ms to live
           Takes or keeps a lock. → 1 it is the owner's now, 0 another holds it
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha1

import msgspec


@dataclass(frozen=True)
class Script:
    """A Lua script and the name Redis caches it under."""

    source: str

    @cached_property
    def sha(self) -> str:
        """SHA-1 of the source in hex, as EVALSHA wants it."""
        return sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class Call(msgspec.Struct, frozen=True):
    """One script with its keys and arguments."""

    script: Script
    keys: list[str]
    args: list[bytes | str | int]

    @property
    def evalsha(self) -> list[bytes | str | int]:
        """Arguments of EVALSHA."""
        return [self.script.sha, len(self.keys), *self.keys, *self.args]


_TIME = """
local function now_ms()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

# SPUBLISH (Redis 7) reaches one shard of a cluster instead of every node. The server itself says
# whether it has it, so publishers need no state; subscribers ask when they connect.
PUBLISH = """
local function publish(channel, message)
    local reply = redis.pcall('SPUBLISH', channel, message)
    if type(reply) == 'table' and reply.err then redis.call('PUBLISH', channel, message) end
end
"""

JOB_STATE = (
    _TIME
    + """
local function is_cancelled(cancel, lease_until, now)
    if cancel or (lease_until and now > tonumber(lease_until)) then return 1 end
    return 0
end
local function log_of(job, epoch)
    return job .. ':log:' .. epoch
end
local function length_with(chunk)
    local fields = cjson.decode(chunk)
    return fields[3] + #fields[4]
end
local function entries_and_length(log)
    local last = redis.call('LINDEX', log, -1)
    if not last then return 0, 0 end
    return redis.call('LLEN', log), length_with(last)
end
"""
)

STORE = Script(
    _TIME
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local now = now_ms()
redis.call('HSET', KEYS[1], 'job', ARGV[2], 'state', 'open', 'epoch', 0, 'base', 0)
if ARGV[3] ~= '0' then redis.call('HSET', KEYS[1], 'lease_until', now + ARGV[3]) end
if ARGV[4] ~= '0' then redis.call('HSET', KEYS[1], 'deadline', ARGV[4]) end
redis.call('ZADD', KEYS[2], now, ARGV[1])
return 1
"""
)

PUBLISHED = Script(
    """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'published', ARGV[1])
return 1
"""
)

DISCARD = Script(
    JOB_STATE
    + """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch then redis.call('DEL', log_of(KEYS[1], epoch)) end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[1], 'state', 'discarded')
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
"""
)

RETIRE = Script(
    JOB_STATE
    + """
local f = redis.call('HMGET', KEYS[1], 'state', 'epoch')
if f[1] ~= 'ended' then return 0 end
if redis.call('TTL', KEYS[1]) > tonumber(ARGV[1]) then
    redis.call('EXPIRE', KEYS[1], ARGV[1])
    redis.call('EXPIRE', log_of(KEYS[1], f[2]), ARGV[1])
end
return 1
"""
)

CANCEL = Script(
    """
if redis.call('HGET', KEYS[1], 'state') ~= 'open' then return 0 end
redis.call('HSET', KEYS[1], 'cancel', 1)
redis.call('SADD', KEYS[2], string.match(KEYS[1], '[^:]+$'))
return 1
"""
)

RENEW = Script(
    _TIME
    + """
local lease_until = now_ms() + ARGV[1]
local renewed = 0
for _, job in ipairs(KEYS) do
    local f = redis.call('HMGET', job, 'state', 'lease_until')
    if f[1] == 'open' and f[2] then
        redis.call('HSET', job, 'lease_until', lease_until)
        renewed = renewed + 1
    end
end
return renewed
"""
)

READ = Script(
    JOB_STATE
    + """
local PAGE = 64
local f = redis.call('HMGET', KEYS[1], 'state', 'job', 'epoch', 'cancel', 'lease_until')
if not f[1] or f[1] == 'discarded' then return {} end
local log, after, start = log_of(KEYS[1], f[3]), tonumber(ARGV[1]), 0
local oldest = after >= 0 and redis.call('LINDEX', log, 0)
if oldest and not cjson.decode(oldest)[6] then
    start = redis.call('LLEN', log)
    repeat
        start = math.max(0, start - PAGE)
        local first_index = cjson.decode(redis.call('LINDEX', log, start))[3]
    until start == 0 or first_index <= after + 1
end
local reply = redis.call('LRANGE', log, start, -1)
table.insert(reply, 1, is_cancelled(f[4], f[5], now_ms()))
table.insert(reply, 1, tonumber(f[3]))
table.insert(reply, 1, f[2])
return reply
"""
)

ONCE = Script(
    """
redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2])
return redis.call('GET', KEYS[1])
"""
)

RELEASE = Script(
    """
local value = redis.call('GET', KEYS[1])
if not value or string.sub(value, 1, #ARGV[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
)

LEAD = Script(
    """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
)
