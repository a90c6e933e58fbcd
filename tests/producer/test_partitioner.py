"""Keys and partitions agree with Kafka's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner.default import DefaultPartitioner
from kafka.partitioner.default import murmur2 as kafka_murmur2

from openlora.protocol.jobs import AdapterRef, Job
from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC, new_job_id
from openlora.sampling_params import SamplingParams
from producer.partitioner import key_of, murmur2, partition_of, topic_of


def a_job(*adapters: AdapterRef, **fields) -> Job:
    params = SamplingParams(seed=1)
    return Job(new_job_id(0), "t", 1, params, prompt="hi", adapters=adapters, **fields)


class _Cluster:
    """What DefaultPartitioner asks of the cluster's metadata."""

    def __init__(self, num_partitions: int) -> None:
        self._partitions = set(range(num_partitions))

    def topics(self) -> set[str]:
        return {"t"}

    def partitions_for_topic(self, topic: str) -> set[int]:
        return self._partitions

    available_partitions_for_topic = partitions_for_topic


@given(st.binary(max_size=64))
def test_murmur2_is_kafkas(data: bytes) -> None:
    assert murmur2(data) == kafka_murmur2(data)


@given(st.text(min_size=1, max_size=40), st.integers(1, 200))
def test_a_keyed_job_goes_where_kafkas_partitioner_puts_it(adapter_id: str, count: int) -> None:
    key = key_of(a_job(AdapterRef(adapter_id, 1, "h")))
    expected = DefaultPartitioner().partition("t", None, key, None, b"", _Cluster(count))
    assert partition_of(key, count) == expected


def test_murmur2_of_known_strings() -> None:
    """Values of Apache Kafka's own test (UtilsTest.testMurmur2)."""
    known = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    assert {data: murmur2(data) - (1 << 32) for data in known} == known


def test_base_model_jobs_have_no_key() -> None:
    assert key_of(a_job()) is None


def test_the_version_is_not_in_the_key() -> None:
    keys = {key_of(a_job(AdapterRef("pirate", version, f"h{version}"))) for version in (1, 2, 9)}
    assert keys == {b"pirate"}


@given(
    st.lists(
        st.tuples(st.text("abc", min_size=1, max_size=3), st.floats(-2, 2)),
        min_size=1,
        max_size=6,
        unique_by=lambda pair: pair[0],
    ),
    st.randoms(),
)
def test_an_ensemble_goes_by_its_heaviest_adapter(pairs: list[tuple[str, float]], random) -> None:
    key = key_of(a_job(*(AdapterRef(name, 1, "h", weight) for name, weight in pairs)))
    heaviest = max(abs(weight) for _, weight in pairs)
    assert key.decode() == min(name for name, weight in pairs if abs(weight) == heaviest)
    random.shuffle(pairs)
    assert key == key_of(a_job(*(AdapterRef(name, 1, "h", weight) for name, weight in pairs)))


def test_the_priority_chooses_the_topic() -> None:
    assert topic_of(a_job()) == JOBS_TOPIC
    assert topic_of(a_job(priority="batch")) == BATCH_TOPIC
