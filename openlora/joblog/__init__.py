"""The job log in Redis: store, claim, append, read, cancel. All Lua of the product is here.

``core`` builds commands and decodes replies without I/O; ``JobLog`` (worker threads) and
``AsyncJobLog`` (gateway) send them.
"""

from openlora.joblog.append import ASK, AppendResult
from openlora.joblog.claim import NOBODY, Claim, Newest
from openlora.joblog.clients import async_redis_client, reach_redis, redis_client
from openlora.joblog.core import JobView, OpenJob
from openlora.joblog.events import EventStream
from openlora.joblog.log import JobLog
from openlora.joblog.log_async import AsyncJobLog

__all__ = [
    "ASK",
    "NOBODY",
    "AppendResult",
    "AsyncJobLog",
    "Claim",
    "EventStream",
    "JobLog",
    "JobView",
    "Newest",
    "OpenJob",
    "async_redis_client",
    "reach_redis",
    "redis_client",
]
