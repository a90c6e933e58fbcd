"""APPEND: what a step says of a shard's jobs goes into their logs and to their readers, atomically.

KEYS  log1, log2, …, cancels, channel, open; a log's key names its job and the chunk's epoch
ARGV  seconds to keep ended jobs
      msgpack [first index, tokens, kind, entries, bytes,  …], five integers for each chunk
      the chunks as one JSON array, which is also what is published

kind: 0 tokens, 1 end, 2 restarted. entries: how many chunks the caller knows the log to hold; -1
asks how the job stands. Per chunk, in order:

    the log of that epoch holds just these entries, tokens     taken: logged and published
      alone are added, and no cancel is open on the shard
      that concerns the job

which is one command, since a log's key carries its epoch: where another worker claimed the job, or
the job is gone, there is no such list to push to. Whatever this does not settle is looked at:

    no such job, or discarded                                  gone
    an epoch above the chunk's                                 fenced
    an epoch below it: Redis lost the claim, see claim.py      unclaimed
    no tokens and kind 0                                       taken: a probe, nothing is written
    first index = length, job open                             taken: logged and published
    all of it within base..length (and the job ended, if it    taken: a repeat, not logged and not
      is an end)                                                 published again
    anything else                                              gap

The taken chunks are published as one JSON array. Not publishing repeats is safe: pub/sub may lose
any message, and readers who miss an index read the log.
→ {position, status, length, cancelled, entries, …}: five integers for each chunk that was looked at
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import msgspec

from openlora.joblog.scripts import JOB_STATE, PUBLISH, Call, Script
from openlora.protocol import codec, names
from openlora.protocol.events import Chunk

ENDED_TTL_S = 24 * 3600
"""How long the log of an ended job stays while its offset is not committed."""
ASK = -1
"""In place of the entries that a log is known to hold."""

Status = Literal["taken", "fenced", "gone", "gap", "unclaimed"]
_STATUS: tuple[Status, ...] = ("taken", "fenced", "gone", "gap", "unclaimed")
_KIND_TOKENS, _KIND_END, _KIND_RESTARTED = 0, 1, 2

_pack = msgspec.msgpack.Encoder().encode
_log_key = lru_cache(maxsize=2048)(names.log_key)
"""A live stream's is asked for with every step."""

APPEND = Script(
    JOB_STATE
    + PUBLISH
    + """
local TAKEN, FENCED, GONE, GAP, UNCLAIMED = 0, 1, 2, 3, 4
local TOKENS, END = 0, 1
local cancels, channel, open = KEYS[#KEYS - 2], KEYS[#KEYS - 1], KEYS[#KEYS]
local call, sub, match = redis.call, string.sub, string.match
local now = nil
local fresh, reply = {}, {}

local function look(key, first, count, kind, chunk)
    now = now or now_ms()
    local job, epoch = match(key, '^(.*):log:(%-?%d+)$')
    epoch = tonumber(epoch)
    local f = call('HMGET', job, 'state', 'epoch', 'base', 'cancel', 'lease_until')
    if not f[1] or f[1] == 'discarded' then return GONE, 0, 0, 0 end
    local log = log_of(job, f[2])
    local entries, length = entries_and_length(log)
    local status = GAP
    local newest = tonumber(f[2])
    if newest ~= epoch then
        status = newest > epoch and FENCED or UNCLAIMED
    elseif count == 0 and kind == TOKENS then
        status = TAKEN
    elseif f[1] == 'open' and first == length then
        status = TAKEN
        length = length + count
        entries = call('RPUSH', log, chunk)
        fresh[#fresh + 1] = chunk
        if kind == END then
            local id = match(job, '[^:]+$')
            call('HSET', job, 'state', 'ended')
            call('ZREM', open, id)
            call('EXPIRE', job, ARGV[1])
            call('EXPIRE', log, ARGV[1])
            if f[4] then call('SREM', cancels, id) end
        end
    elseif first >= tonumber(f[3]) and first + count <= length
        and (kind ~= END or f[1] == 'ended') then
        status = TAKEN
    end
    return status, length, is_cancelled(f[4], f[5], now), entries
end

local facts, chunks = cmsgpack.unpack(ARGV[2]), ARGV[3]
local any_cancel = call('EXISTS', cancels) == 1
local at, i = 2, 0
for k = 1, #facts, 5 do
    i = i + 1
    local log, entries = KEYS[i], facts[k + 3]
    local chunk = sub(chunks, at, at + facts[k + 4] - 1)
    at = at + facts[k + 4] + 1
    local is_taken = false
    if entries > 0 and facts[k + 2] == TOKENS and not (any_cancel
        and call('SISMEMBER', cancels, match(log, '([^:]+):log:%-?%d+$')) == 1) then
        local pushed = call('RPUSHX', log, chunk)
        is_taken = pushed == entries + 1
        if is_taken then
            fresh[#fresh + 1] = chunk
        elseif pushed > 0 then
            call('RPOP', log)
        end
    end
    if not is_taken then
        local n = #reply
        reply[n + 1] = i - 1
        reply[n + 2], reply[n + 3], reply[n + 4], reply[n + 5] =
            look(log, facts[k], facts[k + 1], facts[k + 2], chunk)
    end
end
if #fresh == i then
    publish(channel, chunks)
elseif #fresh > 0 then
    publish(channel, '[' .. table.concat(fresh, ',') .. ']')
end
return reply
"""
)


class AppendResult(msgspec.Struct, frozen=True, gc=False):
    """What became of one chunk.

    taken: logged, or logged before (a repeat). fenced: another worker claimed the job. unclaimed:
    Redis lost the claim that the chunk goes by. gone: there is no such job. gap: it does not follow
    the log; send what comes from index ``length`` on.
    ``length`` is the number of tokens in the log now, ``entries`` the number of its chunks.
    ``cancelled``: the job should stop.
    """

    status: Status
    length: int
    cancelled: bool
    entries: int


def append_calls(
    chunks: Sequence[Chunk], entries: Sequence[int] | None = None
) -> list[tuple[list[int], Call]]:
    """One call per delivery shard, each with the positions of its chunks in ``chunks``.

    ``entries``: what each log is known to hold; None asks about each.
    """
    known = [ASK] * len(chunks) if entries is None else entries
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for position, chunk in enumerate(chunks):
        positions[chunk.job_id[:2]].append(position)
    if len(positions) == 1:  # as where one gateway serves all clients
        (where,) = positions.values()
        return [(where, _call(chunks, known))]
    return [
        (where, _call([chunks[i] for i in where], [known[i] for i in where]))
        for where in positions.values()
    ]


def _call(chunks: Sequence[Chunk], entries: Sequence[int]) -> Call:
    shard = names.shard_of(chunks[0].job_id)
    encode = codec.encode
    keys = []
    facts: list[int] = []
    bodies = []
    for chunk, known in zip(chunks, entries, strict=True):
        keys.append(_log_key(chunk.job_id, chunk.epoch))
        body = encode(chunk)
        bodies.append(body)
        count = len(chunk.tokens)
        if chunk.end is None and not chunk.restarted:
            kind = _KIND_TOKENS
        else:
            kind = _KIND_RESTARTED if chunk.end is None else _KIND_END
        facts += (chunk.first_index, count, kind, known if count else ASK, len(body))
    keys += (names.cancels_key(shard), names.events_channel(shard), names.open_jobs_key(shard))
    return Call(APPEND, keys, [ENDED_TTL_S, _pack(facts), b"[" + b",".join(bodies) + b"]"])


def decode_append(reply: Sequence[int]) -> dict[int, AppendResult]:
    """APPEND's reply: by the chunk's position in the call. One that is missing was taken: the log
    has one entry more than was known."""
    return {
        position: AppendResult(_STATUS[status], length, cancelled == 1, entries)
        for position, status, length, cancelled, entries in zip(
            *(reply[field::5] for field in range(5)), strict=True
        )
    }
