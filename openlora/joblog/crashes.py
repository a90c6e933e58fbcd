"""Which jobs were in an engine that crashed, and which adapters are quarantined for it.

Fields added to a job's hash: ``crashes`` (engines that crashed with it inside), ``alone`` (those in
which it was the only one) and ``story`` (one ``Crash`` as JSON a line, oldest first).
Lines of batches have no hash of their own: a batch's suspected lines share one, line → story.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import redis

from openlora.joblog.clients import redis_errors
from openlora.protocol import codec, names
from openlora.protocol.crashes import Crash, decode_crash

ALONE_LIMIT = 2
"""A job that was alone in so many crashed engines is not run again."""
ADAPTER_LIMIT = 2
"""An adapter with which so many different jobs came to that is quarantined."""
_DEATHS_TTL_S = 24 * 3600
QUARANTINE_TTL_S = 30 * 24 * 3600
"""How long an adapter stays quarantined, unless the operator says otherwise."""

# Sent again after a lost reply, it finds its record at the end of the story.
_CRASHED = """
if redis.call('HGET', KEYS[1], 'state') ~= 'open' then return {0, 0, ''} end
local record = ARGV[2] .. '\\n'
local story = redis.call('HGET', KEYS[1], 'story') or ''
if string.sub(story, -#record) ~= record then
    story = story .. record
    redis.call('HSET', KEYS[1], 'story', story)
    redis.call('HINCRBY', KEYS[1], 'crashes', 1)
    if ARGV[1] == '1' then redis.call('HINCRBY', KEYS[1], 'alone', 1) end
end
local f = redis.call('HMGET', KEYS[1], 'crashes', 'alone')
return {tonumber(f[1] or 0), tonumber(f[2] or 0), story}
"""


# ARGV: record, time to live, then the lines
_LINES_CRASHED = """
for i = 3, #ARGV do
    local story = redis.call('HGET', KEYS[1], ARGV[i]) or ''
    if string.sub(story, -#ARGV[1]) ~= ARGV[1] then
        redis.call('HSET', KEYS[1], ARGV[i], story .. ARGV[1])
    end
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('HMGET', KEYS[1], unpack(ARGV, 3))
"""
_LINES_TTL_S = 7 * 24 * 3600


class Suspicion(msgspec.Struct, frozen=True):
    """What is held against a job."""

    crashes: int = 0
    alone: int = 0
    story: tuple[Crash, ...] = ()

    @property
    def is_deadly(self) -> bool:
        """Whether it killed engines alone, often enough not to be run again."""
        return self.alone >= ALONE_LIMIT


class CrashLog:
    """The worker's side, blocking. Every method may raise ``Overloaded``; calling again is safe.

    ``quarantine_s``: how long an adapter that ends engines is not served.
    """

    def __init__(self, client: redis.Redis, quarantine_s: int = QUARANTINE_TTL_S) -> None:
        self._redis: Any = client  # redis-py's annotations leave replies open
        self._quarantine_s = quarantine_s

    def crashed(self, job_ids: Sequence[str], crash: Crash) -> list[Suspicion]:
        """An engine crashed with these open jobs inside; what is held against each from now on."""
        is_alone = int(crash.jobs == 1)
        record = codec.encode(crash)
        with redis_errors(self._redis):
            return [
                _suspicion(*self._redis.eval(_CRASHED, 1, names.job_key(job_id), is_alone, record))
                for job_id in job_ids
            ]

    def suspicions(self, job_ids: Sequence[str]) -> list[Suspicion]:
        """What is held against each job."""
        if not job_ids:
            return []
        with redis_errors(self._redis), self._redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(names.job_key(job_id), "crashes", "alone", "story")
            return [_suspicion(*fields) for fields in pipeline.execute()]

    def lines_crashed(
        self, batch_id: str, lines: Sequence[int], crash: Crash
    ) -> dict[int, Suspicion]:
        """An engine crashed with these lines of a batch inside; what is held against each."""
        if not lines:
            return {}
        key, record = names.line_crashes_key(batch_id), codec.encode(crash) + b"\n"
        with redis_errors(self._redis):
            stories = self._redis.eval(_LINES_CRASHED, 1, key, record, _LINES_TTL_S, *lines)
        return {line: _of_story(story) for line, story in zip(lines, stories, strict=True)}

    def lines_suspected(self, batch_id: str, lines: Sequence[int]) -> dict[int, Suspicion]:
        """Those of the lines against which something is held."""
        with redis_errors(self._redis):
            stories = self._redis.hmget(names.line_crashes_key(batch_id), lines) if lines else ()
        return {
            line: _of_story(story)
            for line, story in zip(lines, stories, strict=True)
            if story is not None
        }

    def acquit(self, job_id: str) -> None:
        """Hold nothing against the job any more: an operator wants it tried again."""
        with redis_errors(self._redis):
            self._redis.hdel(names.job_key(job_id), "crashes", "alone", "story")

    def adapter_died(self, content_hash: str, job_id: str, reason: str) -> bool:
        """A job that used this adapter is not run again; whether that quarantines the adapter."""
        key = names.adapter_deaths_key(content_hash)
        with redis_errors(self._redis), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.sadd(key, job_id)
            pipeline.expire(key, _DEATHS_TTL_S)
            pipeline.scard(key)
            count: int = pipeline.execute()[-1]
            if count >= ADAPTER_LIMIT:
                quarantine = names.quarantine_key(content_hash)
                self._redis.set(quarantine, reason, ex=self._quarantine_s)
        return count >= ADAPTER_LIMIT

    def pins_died(self, content_hashes: Sequence[str], how: str) -> Sequence[str]:
        """An engine without a job ended while it loaded these pinned adapters; those that are
        quarantined for it: one that was alone, and not for the first time."""
        keys = [names.pin_deaths_key(content_hash) for content_hash in content_hashes]
        with redis_errors(self._redis), self._redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.incr(key)
                pipeline.expire(key, _DEATHS_TTL_S)
            counts = pipeline.execute()[::2]
            if len(counts) != 1 or counts[0] < ADAPTER_LIMIT:
                return ()
            reason = (
                f"the adapter is quarantined: engines ended while they loaded it ({how}); "
                "register a mended one"
            )
            quarantine = names.quarantine_key(content_hashes[0])
            self._redis.set(quarantine, reason, ex=self._quarantine_s)
        return tuple(content_hashes)

    def suspected_pins(self, content_hashes: Sequence[str]) -> set[str]:
        """Those that ``pins_died`` named and ``acquit_pin`` did not."""
        if not content_hashes:
            return set()
        with redis_errors(self._redis):
            keys = [names.pin_deaths_key(content_hash) for content_hash in content_hashes]
            found = self._redis.mget(keys)
        return {h for h, count in zip(content_hashes, found, strict=True) if count is not None}

    def acquit_pin(self, content_hash: str) -> None:
        """An engine has it in its pages, and lives."""
        with redis_errors(self._redis):
            self._redis.delete(names.pin_deaths_key(content_hash))

    def quarantined(self, content_hashes: Sequence[str]) -> dict[str, str]:
        """Those of the adapters that are quarantined, with the reason."""
        if not content_hashes:
            return {}
        with redis_errors(self._redis), self._redis.pipeline(transaction=False) as pipeline:
            for content_hash in content_hashes:
                pipeline.get(names.quarantine_key(content_hash))
            found = pipeline.execute()
        return {
            content_hash: reason.decode()
            for content_hash, reason in zip(content_hashes, found, strict=True)
            if reason is not None
        }

    def release(self, content_hash: str) -> None:
        """End an adapter's quarantine."""
        with redis_errors(self._redis):
            self._redis.delete(names.quarantine_key(content_hash))
            self._redis.delete(names.adapter_deaths_key(content_hash))
            self._redis.delete(names.pin_deaths_key(content_hash))


def _suspicion(crashes: Any, alone: Any, story: bytes | None) -> Suspicion:
    lines = (story or b"").splitlines()
    return Suspicion(int(crashes or 0), int(alone or 0), tuple(map(decode_crash, lines)))


def _of_story(story: bytes) -> Suspicion:
    crashes = tuple(map(decode_crash, story.splitlines()))
    return Suspicion(len(crashes), sum(crash.jobs == 1 for crash in crashes), crashes)
