"""Takes a group of which nobody is a member any more apart and puts its offsets back.

The embedded broker keeps a member that left while it was joining, and waits for it for ever:
nobody gets in again. A broker whose group has members refuses to delete it, which is as it should
be.
"""

from __future__ import annotations

import logging
from typing import Any

from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError

from openlora.protocol.names import WORKER_GROUP

TIMEOUT_MS = 3_000

logger = logging.getLogger("workers.group_repair")


def rebuild_group(bootstrap_servers: str) -> None:
    """Delete the workers' group and commit its offsets anew; what fails is logged alone."""
    try:
        admin: Any = KafkaAdminClient(
            bootstrap_servers=bootstrap_servers.split(","),
            bootstrap_timeout_ms=TIMEOUT_MS,
            request_timeout_ms=TIMEOUT_MS,
        )
    except (KafkaError, OSError) as error:
        logger.info("event=group_not_rebuilt error=%r next=join", error)
        return
    try:
        offsets = admin.list_group_offsets({WORKER_GROUP: None}).get(WORKER_GROUP, {})
        kept = {partition: at for partition, at in offsets.items() if at.offset >= 0}
        answer = admin.delete_groups([WORKER_GROUP])
        if kept:
            admin.alter_group_offsets(WORKER_GROUP, kept)
        logger.warning("event=group_rebuilt answer=%s partitions=%d next=join", answer, len(kept))
    except (KafkaError, OSError) as error:
        logger.info("event=group_not_rebuilt error=%r next=join", error)
    finally:
        admin.close()
