"""The topics: made with the right number of partitions, kept, and described for operators."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import msgspec
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError

from openlora.errors import InvalidRequest, SetupError
from openlora.protocol import names
from openlora.protocol.bulk import RESULTS_TOPIC
from openlora.protocol.status import Heartbeat

DEFAULT_PARTITIONS = 32
RESULTS_PARTITIONS = 4
_TIMEOUT_MS = 10_000

_logger = logging.getLogger(__name__)


class TopicKeeper:
    """Makes the topics where they are missing; one admin connection, for one thread at a time.

    Brokers that create topics by themselves would do it with another number of partitions, so
    every client of ours leaves that off and this is the only place that creates them.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        partitions: int = DEFAULT_PARTITIONS,
        replication_factor: int = 1,
    ) -> None:
        """Connects.

        Raises:
            SetupError: no broker answers at ``bootstrap_servers`` within 10 s.
        """
        self._servers = bootstrap_servers
        self._replication_factor = replication_factor
        self._partitions = dict.fromkeys(names.JOB_TOPICS, partitions)
        # Few messages, read by people: one partition keeps them in order.
        self._partitions[names.DEAD_TOPIC] = 1
        # Bundles of answers, for whichever collector is there: a few keep several of them busy.
        self._partitions[RESULTS_TOPIC] = RESULTS_PARTITIONS
        self._seen: dict[str, int] = {}
        self._found: dict[str, Any] = {}  # topic IDs, as of the last look
        self._ids: dict[str, Any] = {}  # as of the last `ensure`
        self.losses = 0
        """How often a job topic was found to be another one than before, whoever made it: what
        had been published to it is gone."""
        self._admin: Any = self._connect()

    def __enter__(self) -> TopicKeeper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def ensure(self) -> dict[str, int]:
        """Create what is missing, wait until it is usable; → partitions by topic, as they are.

        A topic that exists keeps its number of partitions; one that had more before is made anew.

        Raises:
            SetupError: the broker does not answer, or refuses.
        """
        if self._admin is not None:
            try:
                return self._ensure()
            except (KafkaError, OSError) as error:
                # kafka-python's admin client does not find a restarted broker again; a new one
                # does. One that was closed is not used again, should there be no new one yet.
                _logger.info("connecting to Kafka again after: %r", error)
                self.close()
        self._admin = self._connect()
        try:
            return self._ensure()
        except (KafkaError, OSError) as error:
            raise SetupError(f"topics cannot be made at {self._servers}: {error!r}") from error

    def scale(self, partitions: int) -> dict[str, int]:
        """Add partitions to the job topics until each has ``partitions``; → counts by topic.

        Raises:
            InvalidRequest: a topic has more already, or the broker adds none.
            SetupError: the broker does not answer.
        """
        before = self.ensure()
        assert self._admin is not None
        for topic in names.JOB_TOPICS:
            if before[topic] > partitions:
                raise InvalidRequest(
                    f"{topic} has {before[topic]} partitions already, and Kafka takes none away"
                )
        short = [topic for topic in names.JOB_TOPICS if before[topic] < partitions]
        try:
            if short:
                self._admin.create_partitions(dict.fromkeys(short, partitions))
            counts = self._await_counts(short, partitions)
        except (KafkaError, OSError) as error:
            raise InvalidRequest(
                f"Kafka at {self._servers} adds no partitions ({error!r}); the embedded broker "
                "cannot, Apache Kafka can"
            ) from error
        return {topic: counts[topic] for topic in names.JOB_TOPICS}

    def _await_counts(self, topics: Iterable[str], partitions: int) -> dict[str, int]:
        """Counts by topic, once they are those wanted: a broker tells of new ones a little late."""
        deadline = time.monotonic() + _TIMEOUT_MS / 1000
        while True:
            counts = self._counts()
            late = [topic for topic in topics if counts.get(topic) != partitions]
            if not late:
                return counts
            if time.monotonic() > deadline:
                raise InvalidRequest(
                    f"Kafka at {self._servers} accepted the partitions but does not show them; the "
                    "embedded broker cannot add any, Apache Kafka can"
                )
            time.sleep(0.1)

    def close(self) -> None:
        """Close the connection; ``ensure`` makes a new one."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None

    def _connect(self) -> Any:
        try:
            return KafkaAdminClient(
                bootstrap_servers=self._servers.split(","),
                client_id="openlora-topics",
                bootstrap_timeout_ms=_TIMEOUT_MS,
                request_timeout_ms=_TIMEOUT_MS,
            )
        except (KafkaError, OSError, ValueError) as error:
            raise SetupError(f"no Kafka broker answers at {self._servers}: {error}") from error

    def _ensure(self) -> dict[str, int]:
        counts = self._counts()
        shrunk = self._shrunk(counts)
        if shrunk:
            _logger.warning("topics with too few partitions are made anew: %s", sorted(shrunk))
            self._admin.delete_topics(sorted(shrunk), timeout_ms=_TIMEOUT_MS)
        missing = {
            topic: n
            for topic, n in self._partitions.items()
            if topic not in counts or topic in shrunk
        }
        if missing:
            self._create(missing)
            counts = self._counts()
        # Where a client was quicker again, the number that was seen before still counts.
        self._seen = {t: max(count, self._seen.get(t, 0)) for t, count in counts.items()}
        ids = self._found
        self.losses += any(self._ids.get(t, ids.get(t)) != ids.get(t) for t in names.JOB_TOPICS)
        self._ids = ids
        return counts

    def _shrunk(self, counts: Mapping[str, int]) -> set[str]:
        """Topics that the embedded broker made by itself, with its own number of partitions.

        It comes back empty, and makes what a client asks for by name, whatever the client says of
        that. Nothing is lost with them: what was published to them is published again by those who
        keep it. Topics of other brokers are their operator's.
        """
        shrunk = {
            topic
            for topic, count in counts.items()
            if count < min(self._seen.get(topic, 0), self._partitions[topic])
        }
        if shrunk and self._admin.describe_cluster().get("cluster_id") != names.EMBEDDED_CLUSTER_ID:
            return set()
        return shrunk

    def _create(self, missing: Mapping[str, int]) -> None:
        _logger.info("creating topics: %s", ", ".join(f"{t} ({n})" for t, n in missing.items()))
        for topic, partitions in missing.items():
            # One at a time: another gateway may be at it too, and that is fine.
            with suppress(TopicAlreadyExistsError):
                self._admin.create_topics(
                    {
                        topic: {
                            "num_partitions": partitions,
                            "replication_factor": self._replication_factor,
                        }
                    },
                    timeout_ms=_TIMEOUT_MS,
                )
        self._admin.wait_for_topics(list(missing), timeout_ms=_TIMEOUT_MS)

    def _counts(self) -> dict[str, int]:
        # Of all topics: asking for one by name makes some brokers create it.
        wanted = self._partitions
        found = [
            topic
            for topic in self._admin.describe_topics()
            if topic["name"] in wanted and topic["error_code"] == 0 and topic["partitions"]
        ]
        self._found = {topic["name"]: topic.get("topic_id") for topic in found}
        return {topic["name"]: len(topic["partitions"]) for topic in found}


def ensure_topics(
    bootstrap_servers: str, partitions: int = DEFAULT_PARTITIONS, replication_factor: int = 1
) -> dict[str, int]:
    """``TopicKeeper.ensure`` on a connection of its own. Raises SetupError."""
    with TopicKeeper(bootstrap_servers, partitions, replication_factor) as keeper:
        return keeper.ensure()


class PartitionRow(msgspec.Struct, frozen=True):
    """One partition for an operator's table.

    Two owners are seen for a moment during a hand-over. Without one the offsets are the group's;
    None where nobody could tell them. ``lag``: jobs not finished for sure.
    """

    topic: str
    partition: int
    owners: tuple[str, ...] = ()
    committed: int | None = None
    position: int | None = None
    high_water: int | None = None
    lag: int | None = None
    paused: bool = False


def describe_partitions(
    partitions: Mapping[str, int],
    heartbeats: Iterable[Heartbeat],
    group_offsets: Mapping[tuple[str, int], tuple[int, int]],
) -> list[PartitionRow]:
    """A row for every partition of ``partitions`` (count by topic), from the workers' heartbeats.

    Where two workers show a partition, offsets come from the newer heartbeat; where none does,
    from ``group_offsets``: (committed, end).
    """
    rows = {
        (topic, partition): PartitionRow(topic, partition)
        for topic, count in sorted(partitions.items())
        for partition in range(count)
    }
    for heartbeat in sorted(heartbeats, key=lambda h: h.written_ms):
        for status in heartbeat.partitions:
            where = (status.topic, status.partition)
            known = rows.get(where, PartitionRow(*where))
            rows[where] = PartitionRow(
                *where,
                owners=(*known.owners, heartbeat.id),
                committed=status.committed,
                position=status.position,
                high_water=status.high_water,
                lag=max(0, status.high_water - status.committed),
                paused=status.paused,
            )
    for where, (committed, end) in group_offsets.items():
        if where in rows and not rows[where].owners:
            lag = max(0, end - committed)
            rows[where] = PartitionRow(
                *where, committed=committed, position=committed, high_water=end, lag=lag
            )
    return [rows[where] for where in sorted(rows)]


def partitions_without_owner(
    partitions: Mapping[str, int], heartbeats: Iterable[Heartbeat]
) -> list[tuple[str, int]]:
    """Those of ``partitions`` (count by topic) that no heartbeat shows."""
    owned = {(s.topic, s.partition) for heartbeat in heartbeats for s in heartbeat.partitions}
    every = {(topic, number) for topic, count in partitions.items() for number in range(count)}
    return sorted(every - owned)
