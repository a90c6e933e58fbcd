"""Which worker owns which partitions: cooperative, sticky, the same number of both job topics.

Partition p of every job topic goes to the same member, because the key of both is the adapter:
an adapter is then hot on one worker only. kafka-python's own cooperative-sticky assignor places
partitions one by one and would part them; everything but the placement is taken from it (KIP-429:
members keep what they own while they join).

A partition that moves goes to its new owner at once. KIP-429 has its owner give it up first, and
assigns it in a second round, so that nobody reads it twice; here claims see to that, and a second
round costs the embedded broker seconds in which nobody would read the partition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment

from workers.offsets import Partition


def place(
    numbers: Iterable[int], members: Iterable[str], owners: Mapping[int, str]
) -> dict[int, str]:
    """Give each partition number to one member: as even as can be, with the fewest moves.

    Args:
        numbers: the partition numbers to place.
        members: who takes part, at least one.
        owners: number → the member that owns it now; others count as free.

    Every member gets ⌊n/m⌋ or ⌈n/m⌉ numbers; those who own more than that keep their lowest.
    """
    everyone = sorted(set(members))
    wanted = sorted(set(numbers))
    held: dict[str, list[int]] = {member: [] for member in everyone}
    free = []
    for number in wanted:
        owner = owners.get(number)
        if owner in held:
            held[owner].append(number)
        else:
            free.append(number)
    low, extra = divmod(len(wanted), len(everyone))
    by_size = sorted(everyone, key=lambda member: (-len(held[member]), member))
    quota = {member: low + (rank < extra) for rank, member in enumerate(by_size)}
    for member, own in held.items():
        free += own[quota[member] :]
        del own[quota[member] :]
    free.sort(reverse=True)
    for member in by_size:
        while len(held[member]) < quota[member]:
            held[member].append(free.pop())
    return {number: member for member, own in held.items() for number in own}


class SamePartitionsAssignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """Cooperative-sticky, with partition p of all job topics on the same member.

    Attributes:
        answers: how often the group gave this member its share.
        joined: the group gave this member its share. joining: it asked for one and has no answer.
            Both are set in kafka-python's own thread.
    """

    name = "openlora-same-partitions"

    def __init__(self) -> None:
        super().__init__()
        self.member_assignment = None
        self.answers = 0
        self.joined = False
        self.joining = False

    def metadata(self, topics: Any) -> Any:
        """What this member tells of itself: asked for by kafka-python when it begins to join."""
        self.joining = True
        return super().metadata(topics)

    def on_assignment(self, assignment: Any, generation: int) -> None:
        """The group gave this member its share, which may be none."""
        super().on_assignment(assignment, generation)
        self.answers += 1
        self.joined = True
        self.joining = False

    def forget(self) -> None:
        """Membership was lost: what we owned is no longer ours to announce."""
        self.member_assignment = None
        self.joined = False
        self.joining = False

    def assign(self, cluster: Any, members: list[Any]) -> dict[str, Any]:
        """The leader's part: member ID → what it gets."""
        member_ids = sorted(member.member_id for member in members)
        owned: dict[Partition, str] = {}
        topics: set[str] = set()
        for member in sorted(members, key=lambda member: str(member.member_id)):
            parsed = self.parse_member_metadata(member.metadata)
            topics.update(parsed.subscription)
            for partition in parsed.partitions:
                # Two members can only name the same partition if one has lost its membership
                # without knowing; the claims' epochs keep even that harmless.
                owned.setdefault((partition.topic, partition.partition), member.member_id)
        partitions = sorted(
            (topic, number)
            for topic in topics
            for number in cluster.partitions_for_topic(topic) or ()
        )
        present = set(partitions)
        owned = {partition: member for partition, member in owned.items() if partition in present}
        # By the first topic in name order where it has an owner, so that both follow one.
        number_owners = {
            number: member for (_, number), member in sorted(owned.items(), reverse=True)
        }
        ideal = place((number for _, number in partitions), member_ids, number_owners)
        given: dict[str, list[Partition]] = {member_id: [] for member_id in member_ids}
        for partition in partitions:
            given[ideal[partition[1]]].append(partition)
        return {member_id: self._assignment(own) for member_id, own in given.items()}

    def _assignment(self, partitions: list[Partition]) -> Any:
        by_topic: dict[str, list[int]] = defaultdict(list)
        for topic, number in partitions:
            by_topic[topic].append(number)
        return ConsumerProtocolAssignment(self.version, sorted(by_topic.items()), b"")
