"""What to send to Redis and what its replies mean, without I/O: both shells are thin over this."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from redis.exceptions import NoScriptError

from openlora.errors import InvalidRequest
from openlora.joblog import scripts
from openlora.joblog.scripts import Call
from openlora.protocol import codec, names
from openlora.protocol.events import Chunk, End
from openlora.protocol.jobs import Job
from openlora.protocol.status import Heartbeat

RETIRED_TTL_S = 3600
"""How long it stays from then on: ends outlive the committed offset by this."""
IDEMPOTENCY_TTL_S = 24 * 3600
HEARTBEAT_TTL_S = 5

_logger = logging.getLogger(__name__)


class JobView(msgspec.Struct, frozen=True):
    """A job and its log as they are now; ``end`` is set once it ended."""

    job: Job
    epoch: int
    chunks: tuple[Chunk, ...]
    end: End | None
    cancelled: bool


class OpenJob(msgspec.Struct, frozen=True):
    """An open job as the sweeper looks at it. ``age_ms`` counts from when it was stored;
    ``expired``: its deadline passed; ``published``: topic, partition and offset."""

    job_id: str
    age_ms: int
    epoch: int
    cancelled: bool
    expired: bool
    published: tuple[str, int, int] | None
    claimed_by: str | None


def knows_command(info: Sequence[Any]) -> bool:
    """Whether the server has the command that COMMAND INFO was asked about."""
    return bool(info) and info[0] is not None


def without_script(replies: Sequence[Any]) -> list[int]:
    """Positions of the calls whose script the server does not have (yet, or any more)."""
    return [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]


def store_call(job: Job, lease_ms: int) -> Call:
    """``lease_ms`` counts only for a job that is leased."""
    lease = lease_ms if job.leased else 0
    keys = [names.job_key(job.job_id), names.open_jobs_key(names.shard_of(job.job_id))]
    return Call(scripts.STORE, keys, [job.job_id, codec.encode(job), lease, job.deadline_ms or 0])


def published_call(job_id: str, topic: str, partition: int, offset: int) -> Call:
    """The broker has the job there."""
    return Call(scripts.PUBLISHED, [names.job_key(job_id)], [f"{topic}:{partition}:{offset}"])


def discard_call(job_id: str) -> Call:
    """The job will not run; a tombstone stays for an hour."""
    shard = names.shard_of(job_id)
    keys = [names.job_key(job_id), names.cancels_key(shard), names.open_jobs_key(shard)]
    return Call(scripts.DISCARD, keys, [job_id, RETIRED_TTL_S])


def retire_call(job_id: str, keep_s: int = RETIRED_TTL_S) -> Call:
    """The job's offset is committed: keep its log and end for ``keep_s`` seconds only."""
    return Call(scripts.RETIRE, [names.job_key(job_id)], [keep_s])


def cancel_call(job_id: str) -> Call:
    """Mark an open job."""
    keys = [names.job_key(job_id), names.cancels_key(names.shard_of(job_id))]
    return Call(scripts.CANCEL, keys, [])


def renew_calls(job_ids: Iterable[str], lease_ms: int) -> list[Call]:
    """New leases for jobs that have one: one call per delivery shard."""
    by_shard: defaultdict[str, list[str]] = defaultdict(list)
    for job_id in job_ids:
        by_shard[job_id[:2]].append(names.job_key(job_id))
    return [Call(scripts.RENEW, keys, [lease_ms]) for keys in by_shard.values()]


def read_call(job_id: str, after: int = -1) -> Call:
    """A job and its log behind index ``after``; ``decode_view`` reads the reply."""
    return Call(scripts.READ, [names.job_key(job_id)], [after])


def decode_view(reply: Sequence[Any], after: int) -> JobView | None:
    """READ's reply as ``AsyncJobLog.read`` gives it."""
    if not reply:
        return None
    chunks = tuple(map(codec.decode_chunk, reply[3:]))
    end = chunks[-1].end if chunks else None
    is_restarted = bool(chunks) and chunks[0].restarted
    if after >= 0 and not is_restarted:
        chunks = tuple(
            c for c in chunks if c.first_index + len(c.tokens) > after + 1 or c.end is not None
        )
    return JobView(codec.decode_job(reply[0]), reply[1], chunks, end, bool(reply[2]))


def once_call(tenant: str, key: str, digest: str, job_id: str) -> Call:
    """Claim an idempotency key; ``decode_once`` reads the reply."""
    name = names.idempotency_key(tenant, key)
    return Call(scripts.ONCE, [name], [f"{job_id} {digest}", IDEMPOTENCY_TTL_S])


def decode_once(reply: bytes, key: str, digest: str, job_id: str) -> tuple[str, bool]:
    """The job that holds the key, and whether it is this one.

    Raises:
        InvalidRequest: the key was first used with another request.
    """
    first_job_id, _, first_digest = reply.decode().partition(" ")
    if first_digest != digest:
        raise InvalidRequest(
            f"idempotency_key {key!r} was used with another request; send a new key"
        )
    return first_job_id, first_job_id == job_id


def release_call(tenant: str, key: str, job_id: str) -> Call:
    """Free an idempotency key if this job holds it."""
    return Call(scripts.RELEASE, [names.idempotency_key(tenant, key)], [f"{job_id} "])


def decode_heartbeats(values: Iterable[bytes | None]) -> list[Heartbeat]:
    """Those that are there; one of a version that this one cannot read is left out."""
    found = []
    for value in values:
        if value is not None:
            try:
                found.append(codec.decode_heartbeat(value))
            except InvalidRequest as error:
                _logger.info("heartbeat left out: %s", error.message)
    return found


def lead_call(owner: str, ttl_ms: int) -> Call:
    """Take or keep the sweeper's lock."""
    return Call(scripts.LEAD, [names.SWEEPER_KEY], [owner, ttl_ms])


Acceptance = Literal["stored", "acknowledged", "discarded", "missing"]
"""stored: the broker may have the job or not; acknowledged: it does, or did."""

ACCEPTANCE_FIELDS = ("state", "epoch", "published")


def decode_acceptance(fields: Sequence[bytes | None]) -> Acceptance:
    """From ``ACCEPTANCE_FIELDS`` of a job's hash."""
    state, epoch, published = fields
    if state is None:
        return "missing"
    if state == b"discarded":
        return "discarded"
    # a job that was claimed came from the broker, whether or not its place was noted
    is_known = published is not None or epoch != b"0"
    return "acknowledged" if is_known else "stored"


OPEN_JOB_FIELDS = (
    "epoch",
    "cancel",
    "lease_until",
    "deadline",
    "published",
    "claimed_by",
    "state",
)


def decode_open_job(
    job_id: bytes, stored_ms: float, fields: Sequence[bytes | None], now_ms: int
) -> OpenJob | None:
    """From ``OPEN_JOB_FIELDS`` of the job's hash; None where it ended meanwhile or is lost."""
    epoch, cancel, lease_until, deadline, published, claimed_by, state = fields
    if state != b"open" or epoch is None:
        return None
    where = None
    if published is not None:
        topic, partition, offset = published.decode().rsplit(":", 2)
        where = (topic, int(partition), int(offset))
    return OpenJob(
        job_id=job_id.decode(),
        age_ms=now_ms - int(stored_ms),
        epoch=int(epoch),
        cancelled=cancel is not None or (lease_until is not None and now_ms > int(lease_until)),
        expired=deadline is not None and now_ms > int(deadline),
        published=where,
        claimed_by=None if claimed_by is None else claimed_by.decode(),
    )
