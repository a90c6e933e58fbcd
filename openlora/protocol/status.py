"""What workers tell about themselves (heartbeats) and what is known of an adapter."""

from __future__ import annotations

import msgspec


class PartitionStatus(msgspec.Struct, frozen=True):
    """One partition as its owner sees it; offsets as Kafka counts them.

    ``committed``: next offset to read after a restart. ``position``: next to fetch now.
    ``high_water``: end of the partition at the last fetch; lag is ``high_water - committed``.
    """

    topic: str
    partition: int
    committed: int
    position: int
    high_water: int
    paused: bool = False


class TierStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tier of a worker's adapters: what it holds now, and its counts since the start.

    ``tier``: "device" (pages), "host" (memory) or "disk" (copies of a remote store's). ``contents``
    are hashes of what is there, the longest unused first, of large tiers the ``MAX_CONTENTS`` used
    last; ``adapters`` counts all. ``load_counts``: loads by ``load_buckets_s``, upper bounds, and
    last those that took longer.
    """

    tier: str
    adapters: int = 0
    bytes_used: int = 0
    bytes_limit: int = 0
    hits: int = 0
    loads: int = 0
    failures: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    load_counts: tuple[int, ...] = ()
    load_buckets_s: tuple[float, ...] = ()
    contents: tuple[str, ...] = ()


MAX_CONTENTS = 1000
"""Adapters of a tier that a heartbeat names."""


class Heartbeat(msgspec.Struct, frozen=True):
    """A worker's state, written every second with a time to live of five.

    ``loaded``: the share of the model that is in memory; below 1 (and a little longer) nothing
    that only the model tells is known: numbers are 0 and ``device`` is what was asked for.
    ``tiers``: of its adapters, the fastest first. ``waiting_batch``: of those that wait, what no
    interactive job waits for.
    """

    id: str
    pid: int
    engine_pid: int
    host: str
    device: str
    dtype: str
    model: str
    model_id: str
    max_model_len: int
    ready: bool
    started_ms: int
    written_ms: int
    partitions: tuple[PartitionStatus, ...] = ()
    running: int = 0
    waiting: int = 0
    resident_adapters: tuple[str, ...] = ()
    tokens_per_s: float = 0.0
    max_lora_rank: int = 0
    hidden_size: int = 0
    attention_backend: str = ""
    loaded: float = 1.0
    tiers: tuple[TierStatus, ...] = ()
    waiting_batch: int = 0


class AdapterRecord(msgspec.Struct, frozen=True):
    """One adapter version in the registry.

    ``hash`` names its files in the store. ``owner`` is the tenant that may change it ("" is that of
    keys without a name), ``visibility`` "public" or "private" (to its owner), ``licence`` what the
    owner said of it.
    """

    id: str
    version: int
    hash: str
    rank: int
    targets: tuple[str, ...]
    base_model: str
    size_bytes: int
    source: str
    created_ms: int
    owner: str = ""
    visibility: str = "public"
    licence: str = ""
