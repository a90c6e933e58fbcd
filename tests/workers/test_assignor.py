"""Partition p of both topics on one member, evenly, with the fewest moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from kafka.protocol.consumer.metadata import ConsumerProtocolSubscription
from kafka.structs import TopicPartition

from openlora.protocol.names import BATCH_TOPIC, JOB_TOPICS, JOBS_TOPIC
from workers.assignor import SamePartitionsAssignor, place

MEMBERS = st.sets(st.sampled_from("abcdefg"), min_size=1)


@given(st.integers(1, 40), MEMBERS, st.dictionaries(st.integers(0, 45), st.sampled_from("abcxyz")))
def test_placement_is_complete_and_even(count, members, owners):
    placed = place(range(count), members, owners)
    assert set(placed) == set(range(count))
    sizes = Counter(placed.values())
    assert max(sizes.values()) - min(sizes.get(member, 0) for member in members) <= 1


@given(st.integers(1, 40), MEMBERS, st.data())
def test_no_more_moves_than_evenness_needs(count, members, data):
    owners = data.draw(st.dictionaries(st.integers(0, count - 1), st.sampled_from(sorted(members))))
    placed = place(range(count), members, owners)
    moved = sum(placed[number] != owner for number, owner in owners.items())
    low, extra = divmod(count, len(members))
    held = sorted(Counter(owners.values()).values(), reverse=True)
    over = sum(max(0, own - (low + (rank < extra))) for rank, own in enumerate(held))
    assert moved == over


@given(st.integers(1, 40), MEMBERS, st.dictionaries(st.integers(0, 45), st.sampled_from("abcxyz")))
def test_placement_is_stable(count, members, owners):
    placed = place(range(count), members, owners)
    assert place(range(count), members, placed) == placed


@dataclass
class Member:
    member_id: str
    metadata: object


class Cluster:
    def __init__(self, partitions: dict[str, int]) -> None:
        self.partitions = partitions

    def partitions_for_topic(self, topic):
        count = self.partitions.get(topic)
        return None if count is None else set(range(count))


def rebalance(cluster, assignors):
    """One JoinGroup round with real metadata, encoded and decoded as on the wire."""
    members = [
        Member(
            name,
            ConsumerProtocolSubscription.decode(assignor.metadata(set(JOB_TOPICS)).encode()),
        )
        for name, assignor in assignors.items()
    ]
    leader = assignors[min(assignors)]
    given = leader.assign(cluster, members)
    for name, assignor in assignors.items():
        assignor.on_assignment(given[name], generation=1)
    return {name: set(assignment.partitions()) for name, assignment in given.items()}


def settle(cluster, assignors, rounds=3):
    for _ in range(rounds):
        given = rebalance(cluster, assignors)
        taken = Counter(partition for own in given.values() for partition in own)
        assert max(taken.values(), default=1) == 1
    return given


def test_two_members_share_and_each_number_stays_together():
    cluster = Cluster({JOBS_TOPIC: 8, BATCH_TOPIC: 8})
    first = {"a": SamePartitionsAssignor()}
    assert len(settle(cluster, first)["a"]) == 16
    given = settle(cluster, {**first, "b": SamePartitionsAssignor()})
    assert len(given["a"]) == len(given["b"]) == 8
    for number in range(8):
        owners = {
            name
            for name, own in given.items()
            for partition in own
            if partition.partition == number
        }
        assert len(owners) == 1


def test_what_moves_goes_to_its_new_owner_in_the_same_round():
    cluster = Cluster({JOBS_TOPIC: 8, BATCH_TOPIC: 8})
    assignors = {"a": SamePartitionsAssignor()}
    before = rebalance(cluster, assignors)["a"]
    assignors["b"] = SamePartitionsAssignor()
    after = rebalance(cluster, assignors)
    assert len(after["a"]) == 8
    assert after["b"] == before - after["a"]


def test_a_member_that_leaves_hands_over_in_one_round_and_others_keep_theirs():
    cluster = Cluster({JOBS_TOPIC: 9, BATCH_TOPIC: 9})
    assignors = {name: SamePartitionsAssignor() for name in "abc"}
    before = settle(cluster, assignors)
    del assignors["b"]
    after = rebalance(cluster, assignors)
    assert before["a"] <= after["a"]
    assert before["c"] <= after["c"]
    assert len(after["a"] | after["c"]) == 18


def test_topics_that_were_parted_come_together():
    cluster = Cluster({JOBS_TOPIC: 2, BATCH_TOPIC: 2})
    assignors = {name: SamePartitionsAssignor() for name in "ab"}
    settle(cluster, assignors)
    assignors["a"].member_assignment = [
        TopicPartition(JOBS_TOPIC, 0),
        TopicPartition(BATCH_TOPIC, 1),
    ]
    assignors["b"].member_assignment = [
        TopicPartition(JOBS_TOPIC, 1),
        TopicPartition(BATCH_TOPIC, 0),
    ]
    given = settle(cluster, assignors)
    for own in given.values():
        assert len({partition.partition for partition in own}) == 1
        assert len(own) == 2


def test_topics_of_different_size_and_missing_topics_are_placed():
    assignors = {name: SamePartitionsAssignor() for name in "ab"}
    given = settle(Cluster({JOBS_TOPIC: 4}), assignors)
    assert sum(map(len, given.values())) == 4
    given = settle(Cluster({JOBS_TOPIC: 4, BATCH_TOPIC: 6}), assignors)
    assert sum(map(len, given.values())) == 10
