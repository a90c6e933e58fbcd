"""Which topic, key and partition a job goes to. Pure.

The key is the adapter ID without its version, hashed as Kafka's own clients do (murmur2), so that
any client agrees and a new version stays where the old one was. Base-model jobs have no key and
spread over the partitions.
"""

from __future__ import annotations

from collections.abc import Sequence

from openlora.protocol import names
from openlora.protocol.jobs import AdapterRef, Job

_SEED = 0x9747B28C
_M = 0x5BD1E995
_R = 24
_MASK = 0xFFFFFFFF


def topic_of(job: Job) -> str:
    """The topic that carries jobs of this priority."""
    return names.BATCH_TOPIC if job.priority == "batch" else names.JOBS_TOPIC


def key_of(job: Job) -> bytes | None:
    """The message key; None for the base model. An ensemble goes by its adapter of largest
    absolute weight, ties by smallest ID."""
    return key_of_adapters(job.adapters)


def key_of_adapters(adapters: Sequence[AdapterRef]) -> bytes | None:
    """The same for adapters alone: what a bundle of lines shares."""
    if not adapters:
        return None
    return min(adapters, key=lambda ref: (-abs(ref.weight), ref.id)).id.encode()


def partition_of(key: bytes, num_partitions: int) -> int:
    """Where Kafka's default partitioner puts a message with this key."""
    return (murmur2(key) & 0x7FFFFFFF) % num_partitions


def murmur2(data: bytes) -> int:
    """MurmurHash2, 32 bit (Austin Appleby), with the seed of Kafka's ``Utils.murmur2``."""
    h = _SEED ^ len(data)
    whole = len(data) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * _M & _MASK
        k = (k ^ k >> _R) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    if whole < len(data):
        h = (h ^ int.from_bytes(data[whole:], "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15
