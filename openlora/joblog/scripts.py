"""The Lua scripts of the job log, each with its contract. All of them run on one delivery shard.

Keys of a job: ``job`` (hash) and ``log`` (list of ``Chunk`` as JSON, oldest first). Fields of the
hash:

    job          the ``Job`` as JSON
    state        open | ended | discarded
    epoch        number of claims; 0 until the first one
    length       number of tokens in the log
    base         ``length`` at the newest claim: what is before it is an older epoch's
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
DISCARD    KEYS job, log, open       ARGV job ID, seconds to keep the tombstone
           The job will not run: claims say "ended", appends "gone", reads find nothing. → 1
CLAIM      KEYS job, log             ARGV worker ID
           → {"missing"} | {"ended", epoch} | {"claimed", epoch, cancelled, chunk…}
RECREATE   KEYS job, log, open       ARGV worker ID, job ID, job JSON, epoch, lease ms, deadline
           A log that is missing is opened at epoch + 1; one that is there is claimed, at an epoch
           above both. → as CLAIM
APPEND     KEYS job1, log1, …, channel, open
           ARGV seconds to keep ended jobs, JSON [[epoch, first index, tokens, kind], …], chunk1, …
           kind: 0 tokens, 1 end, 2 restarted. Per chunk, in order:
             no such job, or discarded                           gone
             another epoch                                       fenced
             no tokens and kind 0                                taken: a probe, nothing is written
             first index = length, job open                      taken: logged and published
             all of it within base..length (and the job ended,   taken: a repeat, not logged and
               if it is an end)                                    not published again
             anything else                                       gap
           The taken chunks are published as one JSON array. Not publishing repeats is safe: pub/sub
           may lose any message, and readers who miss an index read the log.
           → {status, length, cancelled, …}, three integers for each chunk
RETIRE     KEYS job, log             ARGV seconds
           Shortens the life of an ended job. → 1 | 0
CANCEL     KEYS job
           Marks an open job; its worker learns it from the next append or claim. → 1 marked,
           0 not open
RENEW      KEYS job1, …              ARGV lease ms
           Open jobs that have a lease get a new one. → number renewed
READ       KEYS job, log
           → {} | {job JSON, epoch, cancelled, chunk…}
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


@dataclass(frozen=True)
class Script:
    """A Lua script and the name Redis caches it under."""

    source: str

    @cached_property
    def sha(self) -> str:
        """SHA-1 of the source in hex, as EVALSHA wants it."""
        return sha1(self.source.encode(), usedforsecurity=False).hexdigest()


_TIME = """
local function now_ms()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

# SPUBLISH (Redis 7) reaches one shard of a cluster instead of every node. The server itself says
# whether it has it, so publishers need no state; subscribers ask when they connect.
_PUBLISH = """
local function publish(channel, message)
    local reply = redis.pcall('SPUBLISH', channel, message)
    if type(reply) == 'table' and reply.err then redis.call('PUBLISH', channel, message) end
end
"""

_CANCELLED = (
    _TIME
    + """
local function is_cancelled(cancel, lease_until, now)
    if cancel or (lease_until and now > tonumber(lease_until)) then return 1 end
    return 0
end
"""
)

STORE = Script(
    _TIME
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local now = now_ms()
redis.call('HSET', KEYS[1], 'job', ARGV[2], 'state', 'open', 'epoch', 0, 'length', 0, 'base', 0)
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
    """
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[1], 'state', 'discarded')
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
"""
)

_CLAIM = (
    _CANCELLED
    + """
local function claim(job, log, worker, above)
    local f = redis.call('HMGET', job, 'state', 'epoch', 'length', 'cancel', 'lease_until')
    if not f[1] then return {'missing'} end
    if f[1] ~= 'open' then return {'ended', tonumber(f[2] or 0)} end
    local epoch = math.max(tonumber(f[2]), above) + 1
    redis.call('HSET', job, 'epoch', epoch, 'base', f[3], 'claimed_by', worker)
    local reply = redis.call('LRANGE', log, 0, -1)
    table.insert(reply, 1, is_cancelled(f[4], f[5], now_ms()))
    table.insert(reply, 1, epoch)
    table.insert(reply, 1, 'claimed')
    return reply
end
"""
)

CLAIM = Script(_CLAIM + "return claim(KEYS[1], KEYS[2], ARGV[1], 0)")

RECREATE = Script(
    _CLAIM
    + """
local reply = claim(KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[4]))
if reply[1] ~= 'missing' then return reply end
local now = now_ms()
local epoch = ARGV[4] + 1
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'job', ARGV[3], 'state', 'open', 'epoch', epoch, 'length', 0,
    'base', 0, 'claimed_by', ARGV[1])
if ARGV[5] ~= '0' then redis.call('HSET', KEYS[1], 'lease_until', now + ARGV[5]) end
if ARGV[6] ~= '0' then redis.call('HSET', KEYS[1], 'deadline', ARGV[6]) end
redis.call('ZADD', KEYS[3], now, ARGV[2])
return {'claimed', epoch, 0}
"""
)

APPEND = Script(
    _CANCELLED
    + _PUBLISH
    + """
local TAKEN, FENCED, GONE, GAP = 0, 1, 2, 3
local END = 1
local channel, open = KEYS[#KEYS - 1], KEYS[#KEYS]
local now = now_ms()
local fresh, reply = {}, {}
for i, chunk in ipairs(cjson.decode(ARGV[2])) do
    local job, log = KEYS[2 * i - 1], KEYS[2 * i]
    local epoch, first, count, kind = chunk[1], chunk[2], chunk[3], chunk[4]
    local f = redis.call('HMGET', job, 'state', 'epoch', 'length', 'base', 'cancel', 'lease_until')
    local length = tonumber(f[3] or 0)
    local status = GAP
    if not f[1] or f[1] == 'discarded' then
        status = GONE
    elseif tonumber(f[2]) ~= epoch then
        status = FENCED
    elseif count == 0 and kind == 0 then
        status = TAKEN
    elseif f[1] == 'open' and first == length then
        status = TAKEN
        length = length + count
        redis.call('RPUSH', log, ARGV[i + 2])
        fresh[#fresh + 1] = ARGV[i + 2]
        if kind == END then
            redis.call('HSET', job, 'length', length, 'state', 'ended')
            redis.call('ZREM', open, string.match(job, '[^:]+$'))
            redis.call('EXPIRE', job, ARGV[1])
            redis.call('EXPIRE', log, ARGV[1])
        elseif count > 0 then
            redis.call('HSET', job, 'length', length)
        end
    elseif first >= tonumber(f[4]) and first + count <= length
        and (kind ~= END or f[1] == 'ended') then
        status = TAKEN
    end
    reply[3 * i - 2] = status
    reply[3 * i - 1] = length
    reply[3 * i] = is_cancelled(f[5], f[6], now)
end
if #fresh > 0 then publish(channel, '[' .. table.concat(fresh, ',') .. ']') end
return reply
"""
)

RETIRE = Script(
    """
if redis.call('HGET', KEYS[1], 'state') ~= 'ended' then return 0 end
if redis.call('TTL', KEYS[1]) > tonumber(ARGV[1]) then
    redis.call('EXPIRE', KEYS[1], ARGV[1])
    redis.call('EXPIRE', KEYS[2], ARGV[1])
end
return 1
"""
)

CANCEL = Script(
    """
if redis.call('HGET', KEYS[1], 'state') ~= 'open' then return 0 end
redis.call('HSET', KEYS[1], 'cancel', 1)
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
    _CANCELLED
    + """
local f = redis.call('HMGET', KEYS[1], 'state', 'job', 'epoch', 'cancel', 'lease_until')
if not f[1] or f[1] == 'discarded' then return {} end
local reply = redis.call('LRANGE', KEYS[2], 0, -1)
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
