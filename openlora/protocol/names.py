"""Names of topics, Redis keys and channels, and the shape of a job ID. Pure.

A job ID starts with its delivery shard (two hex digits), so any process finds a job's keys and
channel from the ID alone. The shard is the Redis Cluster hash tag: one job lives in one slot.
"""

from __future__ import annotations

import secrets

JOBS_TOPIC = "openlora.jobs"
BATCH_TOPIC = "openlora.batch"
DEAD_TOPIC = "openlora.dead"
JOB_TOPICS = (JOBS_TOPIC, BATCH_TOPIC)
WORKER_GROUP = "openlora.workers"
EMBEDDED_CLUSTER_ID = "tansu_cluster"
"""What the embedded broker calls its cluster where nobody names it."""

SHARD_COUNT = 256
_SHARD_DIGITS = 2
_RANDOM_BYTES = 12
JOB_ID_LENGTH = _SHARD_DIGITS + 2 * _RANDOM_BYTES

WORKERS_KEY = "openlora:workers"
"""Set of worker IDs that have a heartbeat (or had one a moment ago)."""
SWEEPER_KEY = "openlora:sweeper"
"""String with a time to live: the gateway that sweeps now."""
ADAPTERS_KEY = "openlora:adapters"
"""Hash: adapter ID (``tenant/ID`` of private ones) → the newest AdapterRecord as JSON."""
ADAPTERS_CONTENTS_KEY = "{openlora:adapters}:contents"
"""Hash: content hash → number of registered versions that name it. In the slot of the above."""
ADAPTERS_DROPPED_KEY = "{openlora:adapters}:dropped"
"""Sorted set: content that no version names any more, by the time it was dropped (ms)."""
ADAPTERS_REVISION_KEY = "{openlora:adapters}:revision"
"""Number of changes to the registry so far."""
ADAPTERS_PINS_KEY = "{openlora:adapters}:pins"
"""Set: keys (as in ``ADAPTERS_KEY``) of adapters that workers keep in pages."""
ADAPTERS_HOLDER_KEY = "{openlora:adapters}:holder"
"""String: the name under which this registry holds content in stores."""
ADAPTERS_CHANNEL = "openlora:adapters:changed"
"""Pub/sub: the revision and the key of an adapter that was added, replaced or removed."""
ARRIVALS_KEY = "openlora:arrivals"
"""Number: jobs that all gateways have taken."""
MESSAGES_CHANNEL = "openlora:messages"
"""Pub/sub: something was published to a job topic a moment ago (see joblog/hints.py)."""


def new_job_id(shard: int) -> str:
    """A fresh job ID on delivery shard ``shard`` (0..255): 2 + 24 lower-case hex digits."""
    return f"{shard:02x}{secrets.token_hex(_RANDOM_BYTES)}"


def is_job_id(text: str) -> bool:
    """Whether ``text`` has the shape of a job ID; checked before it becomes part of a key."""
    return len(text) == JOB_ID_LENGTH and all(c in "0123456789abcdef" for c in text)


def shard_of(job_id: str) -> int:
    """The delivery shard of a job ID."""
    return int(job_id[:_SHARD_DIGITS], 16)


def job_key(job_id: str) -> str:
    """Hash: the job's record (job JSON, epoch, state, cancel mark, lease)."""
    return f"openlora:{{{job_id[:2]}}}:job:{job_id}"


def log_key(job_id: str, epoch: int) -> str:
    """List: the job's chunks, oldest first, each one ``Chunk`` as JSON.

    A claim renames it to its own epoch: an older worker has nothing to append to.
    """
    return f"{job_key(job_id)}:log:{epoch}"


def open_jobs_key(shard: int) -> str:
    """Sorted set: jobs of the shard that have not ended, by time stored (ms)."""
    return f"openlora:{{{shard:02x}}}:open"


def cancels_key(shard: int) -> str:
    """Set: open jobs of the shard with a cancel mark."""
    return f"openlora:{{{shard:02x}}}:cancels"


def events_channel(shard: int) -> str:
    """Pub/sub channel of the shard: each message is a JSON array of ``Chunk``."""
    return f"openlora:{{{shard:02x}}}:events"


def adapter_versions_key(key: str) -> str:
    """Hash: version → AdapterRecord of one adapter; ``key`` as in ``ADAPTERS_KEY``."""
    return f"{{openlora:adapters}}:versions:{key}"


def quarantine_key(content_hash: str) -> str:
    """String with a time to live: why an adapter that ended engines is not served."""
    return f"openlora:quarantine:{content_hash}"


def adapter_deaths_key(content_hash: str) -> str:
    """Set, 24 h: jobs with this adapter that are not run again since they ended engines."""
    return f"openlora:adapter-deaths:{content_hash}"


def pin_deaths_key(content_hash: str) -> str:
    """Number, 24 h: engines that ended while they loaded this pinned adapter, with no job."""
    return f"openlora:pin-deaths:{content_hash}"


def line_crashes_key(batch_id: str) -> str:
    """Hash, 7 days: line of a batch that was in engines when they crashed → its crashes."""
    return f"openlora:{{{batch_id}}}:crashes"


def tenant_jobs_key(tenant: str) -> str:
    """Sorted set: the tenant's open jobs (and some that have ended), by time accepted."""
    return f"openlora:in-flight:tenant:{tenant}"


def adapter_jobs_key(tenant: str, adapter_id: str) -> str:
    """Sorted set: those of the tenant's open jobs that use the adapter, as above.

    The tenant's length keeps ("a", "b:c") and ("a:b", "c") apart.
    """
    return f"openlora:in-flight:adapter:{len(tenant)}:{tenant}:{adapter_id}"


def rate_key(key_id: str) -> str:
    """String with a time to live: when the API key's next request would be in time (ms)."""
    return f"openlora:rate:{key_id}"


def worker_key(worker_id: str) -> str:
    """String with a time to live: the worker's newest heartbeat as JSON."""
    return f"openlora:worker:{worker_id}"


def idempotency_key(tenant: str, key: str) -> str:
    """String, 24 h: the job that first used this idempotency key, and its request's digest.

    The tenant's length keeps ("a", "b:c") and ("a:b", "c") apart.
    """
    return f"openlora:idempotency:{len(tenant)}:{tenant}:{key}"
