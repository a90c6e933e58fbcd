"""Batches in Redis: one hash each, one bitmap of finished lines, one hash of progress by adapter.

A step is begun and finished by compare-and-set on the hash's ``step``, so that of a task that runs
twice only the first counts; lines are counted by their bits, so that of two answers only the first
counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import redis

from openlora.joblog.clients import redis_errors
from openlora.protocol.bulk import stop_key
from openlora.protocol.codec import encode
from producer.bulk import scripts
from producer.bulk.keys import (
    OPEN_KEY,
    batch_key,
    contents_key,
    done_key,
    errors_key,
    progress_key,
    tenant_key,
    tenant_open_key,
)
from producer.bulk.records import BatchRecord, BatchState, Ending, LineError, Step

MAX_ERRORS = 20
KEEP_OVER_S = 30 * 86_400
"""How long a batch is known after its end, unless the operator says otherwise."""
_STOP_TTL_S = 7 * 86_400
_CONTENTS_TTL_S = 8 * 86_400
"""A day longer than the longest window of a batch."""
_MARKS_AT_ONCE = 2000
_FORGET_AT_ONCE = 100


class Mark(msgspec.Struct, frozen=True):
    """One line that has its result."""

    line: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: bool = False


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class BatchStates:
    """All batches. Safe for several threads; every method may raise Overloaded (no Redis).

    ``keep_over_s``: how long one is known after its end.
    """

    def __init__(self, client: redis.Redis, keep_over_s: int = KEEP_OVER_S) -> None:
        self._redis: Any = client
        self._keep_over_s = keep_over_s
        self._create = client.register_script(scripts.CREATE)
        self._begin = client.register_script(scripts.BEGIN)
        self._set = client.register_script(scripts.SET)
        self._end = client.register_script(scripts.END)
        self._mark = client.register_script(scripts.MARK)

    def create(self, record: BatchRecord, max_open: int) -> bool:
        """Store a new batch; False where the tenant has ``max_open`` open ones already. Stored
        again, it is still one."""
        tenant = record.tenant
        keys = [batch_key(record.id), OPEN_KEY, tenant_open_key(tenant), tenant_key(tenant)]
        with redis_errors(self._redis):
            args: list[str | bytes | int]
            args = [record.id, encode(record), record.created_ms, max_open]
            return bool(self._create(keys=keys, args=args))

    def get(self, batch_id: str) -> BatchState | None:
        """The batch as it is now; None where there is none."""
        with redis_errors(self._redis):
            return _state(self._redis.hgetall(batch_key(batch_id)))

    def page(self, tenant: str, limit: int, after: str | None) -> tuple[list[BatchState], bool]:
        """The tenant's batches behind ``after``, newest first; and whether there are more."""
        with redis_errors(self._redis):
            key = tenant_key(tenant)
            rank = None if after is None else self._redis.zrevrank(key, after)
            first = 0 if rank is None else rank + 1
            ids = self._redis.zrevrange(key, first, first + limit)
            states = [self.get(batch_id.decode()) for batch_id in ids[:limit]]
            return [state for state in states if state is not None], len(ids) > limit

    def open_ids(self) -> list[str]:
        """Batches that are not over."""
        with redis_errors(self._redis):
            return sorted(member.decode() for member in self._redis.smembers(OPEN_KEY))

    def begin(self, state: BatchState, step: Step) -> bool:
        """Note that ``step`` is queued; False where the batch moved on since ``state``."""
        keys = [batch_key(state.id)]
        with redis_errors(self._redis):
            args: list[str | int] = [state.step, state.step_ms, step.token, now_ms()]
            return bool(self._begin(keys=keys, args=args))

    def change(self, state: BatchState, fields: Mapping[str, object]) -> bool:
        """Set fields of a batch without a step; False where the batch moved on since ``state``."""
        return self._change(state.id, state.step, state.phase, fields)

    def finish(self, batch_id: str, step: Step, fields: Mapping[str, object]) -> bool:
        """The step is done, with these fields; False where somebody else finished it before."""
        return self._change(batch_id, step.token, "", fields)

    def _change(self, batch_id: str, step: str, phase: str, fields: Mapping[str, object]) -> bool:
        words = [word for pair in _fields(fields).items() for word in pair]
        with redis_errors(self._redis):
            return bool(self._set(keys=[batch_key(batch_id)], args=[step, phase, *words]))

    def report_problem(self, batch_id: str, problem: str) -> None:
        """Show why the batch does not go on; the next step that is done takes it away."""
        with redis_errors(self._redis):
            if self._redis.hexists(batch_key(batch_id), "record"):
                self._redis.hset(batch_key(batch_id), "problem", problem)

    def end(self, batch_id: str, ending: Ending) -> bool:
        """Ask for an early end: workers stop at once. False where there is no such batch.

        The step under way is forgotten: it may wait for what the end does not need any more, a
        broker or a worker.
        """
        keys = [batch_key(batch_id), stop_key(batch_id)]
        with redis_errors(self._redis):
            answer = self._end(keys=keys, args=[ending, now_ms(), _STOP_TTL_S])
            return bool(answer != b"missing")

    def stop_workers(self, batch_id: str) -> None:
        """Tell workers that nobody wants more answers."""
        with redis_errors(self._redis):
            self._redis.set(stop_key(batch_id), 1, ex=_STOP_TTL_S)

    def mark(self, batch_id: str, marks: Sequence[Mark], *, source: str, adapter: str) -> int:
        """These lines have their results; how many of them are new; -1 where the batch is over.

        ``source`` "worker": they count as answered.
        """
        fresh = 0
        for first in range(0, len(marks), _MARKS_AT_ONCE):
            args: list[str | int] = [now_ms(), source, adapter]
            for mark in marks[first : first + _MARKS_AT_ONCE]:
                args += [mark.line, mark.prompt_tokens, mark.completion_tokens, int(mark.failed)]
            with redis_errors(self._redis):
                keys = [batch_key(batch_id), done_key(batch_id), progress_key(batch_id)]
                count = int(self._mark(keys=keys, args=args))
            if count < 0:
                return -1
            fresh += count
        return fresh

    def finished_lines(self, batch_id: str) -> bytes:
        """A bit for every line: is its result there? See ``has_bit``."""
        with redis_errors(self._redis):
            return self._redis.get(done_key(batch_id)) or b""

    def adapter_progress(self, batch_id: str) -> dict[str, int]:
        """Lines done by adapter ID; "" is the base model."""
        with redis_errors(self._redis):
            counts = self._redis.hgetall(progress_key(batch_id))
        return {name.decode(): int(count) for name, count in counts.items()}

    def hold_contents(self, batch_id: str, hashes: Iterable[str]) -> None:
        """Keep the content of these adapters until the batch is over, whatever becomes of them."""
        found = sorted(hashes)
        if found:
            with redis_errors(self._redis), self._redis.pipeline() as pipeline:
                pipeline.sadd(contents_key(batch_id), *found)
                # A step that is done twice may come after the batch's end, and nobody after it.
                pipeline.expire(contents_key(batch_id), _CONTENTS_TTL_S)
                pipeline.execute()

    def add_error(self, batch_id: str, errors: Iterable[LineError]) -> None:
        """Keep the first ``MAX_ERRORS`` errors to show with the batch."""
        with redis_errors(self._redis), self._redis.pipeline() as pipeline:
            for error in errors:
                pipeline.rpush(errors_key(batch_id), encode(error))
            pipeline.ltrim(errors_key(batch_id), 0, MAX_ERRORS - 1)
            pipeline.execute()

    def errors(self, batch_id: str) -> list[LineError]:
        """The first errors."""
        with redis_errors(self._redis):
            entries = self._redis.lrange(errors_key(batch_id), 0, -1)
        return [msgspec.json.decode(entry, type=LineError) for entry in entries]

    def close(self, state: BatchState) -> None:
        """The batch is over: what only a running one needs goes, the rest in a while.

        With it, places in the tenant's list go whose batches were forgotten.
        """
        with redis_errors(self._redis), self._redis.pipeline() as pipeline:
            for key in (batch_key(state.id), progress_key(state.id), errors_key(state.id)):
                pipeline.expire(key, self._keep_over_s)
            pipeline.srem(OPEN_KEY, state.id)
            pipeline.srem(tenant_open_key(state.record.tenant), state.id)
            pipeline.delete(done_key(state.id))
            pipeline.delete(contents_key(state.id))
            pipeline.execute()
        self._drop_forgotten(tenant_key(state.record.tenant))

    def _drop_forgotten(self, key: str) -> None:
        """Of the oldest places in a tenant's list, those whose batches are not known any more."""
        with redis_errors(self._redis):
            ids = self._redis.zrange(key, 0, _FORGET_AT_ONCE - 1)
            with self._redis.pipeline(transaction=False) as pipeline:
                for batch_id in ids:
                    pipeline.exists(batch_key(batch_id.decode()))
                known = pipeline.execute()
            forgotten = [i for i, is_known in zip(ids, known, strict=True) if not is_known]
            if forgotten:
                self._redis.zrem(key, *forgotten)


def has_bit(bits: bytes, line: int) -> bool:
    """Whether Redis' bitmap ``bits`` has ``line``'s bit (the highest bit of a byte comes first)."""
    place = line >> 3
    return place < len(bits) and bool(bits[place] & (0x80 >> (line & 7)))


def _fields(fields: Mapping[str, object]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str | bytes | int) else encode(value)
        for name, value in fields.items()
    }


def _state(fields: Mapping[bytes, bytes]) -> BatchState | None:
    if b"record" not in fields:
        return None
    values: dict[str, Any] = {}
    for name, value in fields.items():
        key = name.decode()
        if key == "record":
            values[key] = msgspec.json.decode(value, type=BatchRecord)
        elif value:
            values[key] = value.decode()
    # Redis gives numbers as text
    return msgspec.convert(values, BatchState, strict=False)
