"""Joins when the group is at rest: a join in the middle of a rebalance prolongs it for all.

A worker that is started again joins seconds after its predecessor died. The group is then waiting
for the dead one's session to end, and would share out the partitions twice; meanwhile their
streams stand still.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from openlora.protocol.names import JOBS_TOPIC
from openlora.protocol.status import Heartbeat

FRESH_MS = 2_500
"""A worker that wrote nothing for so long is dead or as good as that: it writes every second."""
PATIENCE_S = 12.0
"""A session that runs out, and a rebalance; after it the join cannot make anything worse."""
LOOK_INTERVAL_S = 0.25

logger = logging.getLogger("workers.settling")


def is_settled(heartbeats: Sequence[Heartbeat], partitions: int, now_ms: float) -> bool:
    """Whether living workers own all ``partitions`` of the interactive topic, or nobody lives."""
    living = [h for h in heartbeats if h.ready and now_ms - h.written_ms < FRESH_MS]
    owned = {s.partition for h in living for s in h.partitions if s.topic == JOBS_TOPIC}
    return not living or len(owned) >= partitions
