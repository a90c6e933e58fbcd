"""The disk tier: verified, placed whole, shared, evicted by use, never while it is read."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest

from openlora.adapters.adapter_source import Cancelled, Evicted
from openlora.adapters.disk_cache import DiskCache
from openlora.adapters.peft_format import inspect_adapter
from openlora.errors import AdapterFailed
from tests.adapters.folder_source import FolderSource

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def source(tmp_path):
    (tmp_path / "store").mkdir()
    return FolderSource(tmp_path / "store")


@pytest.fixture
def cache(tmp_path, source):
    return DiskCache(tmp_path / "cache", source, 1 << 20, back_off_s=(0.001, 0.002))


def left_over(cache):
    return sorted(
        path.name for path in cache.root.iterdir() if path.name.startswith((".incoming", ".trash"))
    )


def test_an_adapter_is_fetched_once_and_then_there(cache, source):
    (content,) = source.add(4)
    path = cache.path(content)
    assert cache.owns(path)
    assert not cache.has(path)
    cache.ensure(path)
    for _ in range(2):
        with cache.reading(path):
            assert inspect_adapter(path).hash == content
    assert source.fetches == [content]
    stats = cache.stats()
    assert (stats.tier, stats.adapters, stats.loads, stats.hits) == ("disk", 1, 1, 1)
    assert stats.bytes_used == sum(f.stat().st_size for f in path.iterdir())
    assert sum(stats.load_counts) == 1
    assert left_over(cache) == []


def test_many_who_want_one_share_its_fetch(cache, source):
    (content,) = source.add(4)
    source.gate = threading.Event()
    threads = [threading.Thread(target=cache.ensure, args=(cache.path(content),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    while not source.fetches:
        time.sleep(0.001)
    source.gate.set()
    for thread in threads:
        thread.join()
    assert source.fetches == [content]


def test_a_store_that_is_away_is_asked_again_and_then_named(cache, source):
    (content,) = source.add(4)
    source.errors = [ConnectionError("refused"), TimeoutError("slow")]
    cache.ensure(cache.path(content))
    assert len(source.fetches) == 3
    (other,) = source.add(8)
    source.errors = [ConnectionError("refused")] * 3
    with pytest.raises(AdapterFailed, match=r"test://store does not give adapter .*refused"):
        cache.ensure(cache.path(other))
    assert cache.stats().failures == 1
    cache.ensure(cache.path(other))


def test_other_bytes_are_retried_then_refused_and_kept_aside(cache, source):
    (content,) = source.add(4)
    weights = source.root / content / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterFailed, match=r"gives other bytes for adapter .*SHA-256"):
        cache.ensure(cache.path(content))
    assert len(source.fetches) == 3
    assert not cache.has(cache.path(content))
    assert (cache.root / ".quarantine" / content / WEIGHTS).exists()
    with pytest.raises(AdapterFailed, match="gives other bytes"):
        cache.ensure(cache.path(content))
    assert len(source.fetches) == 3  # not asked for again so soon
    assert left_over(cache) == []


def test_few_of_many_wrong_ones_are_kept(cache, source):
    for content in source.add(*range(1, 9)):
        (source.root / content / WEIGHTS).write_bytes(b"x")
        with pytest.raises(AdapterFailed, match="no usable adapter"):
            cache.ensure(cache.path(content))
    assert len(list((cache.root / ".quarantine").iterdir())) == 4
    assert list((cache.root / ".locks").iterdir()) == []


def test_what_was_refused_long_ago_is_forgotten(cache, source, monkeypatch):
    monkeypatch.setattr("openlora.adapters.disk_cache.REFUSED_S", 0.0)
    for content in source.add(1, 2, 3):
        (source.root / content / WEIGHTS).write_bytes(b"x")
        with pytest.raises(AdapterFailed):
            cache.ensure(cache.path(content))
    assert len(cache._refused) == 1


def test_bytes_that_are_wrong_once_are_right_the_next_time(cache, source):
    (content,) = source.add(4)
    weights = source.root / content / WEIGHTS
    right = weights.read_bytes()
    weights.write_bytes(right[:-5])

    def mend(content_hash, directory, cancelled, fetch=source.fetch):
        fetch(content_hash, directory, cancelled)
        weights.write_bytes(right)

    source.fetch = mend
    cache.ensure(cache.path(content))
    assert cache.has(cache.path(content))


def test_what_the_store_lacks_is_not_asked_for_twice(cache, source):
    with pytest.raises(AdapterFailed, match="is not in the store"):
        cache.ensure(cache.path("0" * 64))
    assert len(source.fetches) == 1


def test_the_longest_unused_go_and_one_that_is_read_stays(cache, source, tmp_path):
    contents = source.add(4, 8, 12, 16)
    sizes = [sum(f.stat().st_size for f in (source.root / c).iterdir()) for c in contents]
    small = DiskCache(tmp_path / "small", source, sum(sizes[:3]) + 10, back_off_s=())
    for age, content in enumerate(contents[:3]):
        small.ensure(small.path(content))
        os.utime(small.path(content), (age, age))
    with small.reading(small.path(contents[0])):
        os.utime(small.path(contents[0]), (0, 0))
        small.ensure(small.path(contents[3]))
        assert small.has(small.path(contents[0]))
    assert not small.has(small.path(contents[1]))
    assert small.has(small.path(contents[3]))
    assert small.stats().bytes_used <= sum(sizes[:3]) + 10
    assert small.stats().evictions >= 1


def test_what_was_fetched_to_be_read_stays_until_then_and_not_for_ever(source, tmp_path):
    contents = source.add(4, 8, 12)
    size = max(sum(f.stat().st_size for f in (source.root / c).iterdir()) for c in contents)
    small = DiskCache(tmp_path / "small", source, size + 10, back_off_s=())
    paths = [small.path(content) for content in contents]
    small.ensure(paths[0], keep_s=30)
    small.ensure(paths[1], keep_s=30)
    assert all(map(small.has, paths[:2]))
    with small.reading(paths[0]):
        pass
    small.ensure(paths[2], keep_s=0.0)
    assert [small.has(path) for path in paths[:2]] == [False, True]


def test_reading_never_fetches(cache, source):
    (content,) = source.add(4)
    with pytest.raises(Evicted), cache.reading(cache.path(content)):
        pass
    assert source.fetches == []
    assert list((cache.root / ".locks").iterdir()) == []


def test_an_adapter_over_the_budget_is_refused_with_both_numbers(source, tmp_path):
    (content,) = source.add(4)
    small = DiskCache(tmp_path / "small", source, 100, back_off_s=())
    with pytest.raises(AdapterFailed, match="may hold 100"):
        small.ensure(small.path(content))


def test_a_full_disk_makes_room_or_says_so(cache, source):
    first, second = source.add(4, 8)
    full = OSError(errno.ENOSPC, "No space left on device")
    source.errors = [full]
    with pytest.raises(AdapterFailed, match=r"cannot be written: .*No space left.*free space"):
        cache.ensure(cache.path(first))
    cache.ensure(cache.path(first))
    source.errors = [full]
    cache.ensure(cache.path(second))
    assert not cache.has(cache.path(first))
    assert left_over(cache) == []


def test_a_fetch_that_nobody_wants_any_more_ends(cache, source):
    (content,) = source.add(4)
    source.gate, cancelled = threading.Event(), threading.Event()
    caught = []

    def want():
        try:
            cache.ensure(cache.path(content), cancelled)
        except Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=want)
    thread.start()
    cancelled.set()
    thread.join(5)
    assert len(caught) == 1
    assert left_over(cache) == []


def test_what_a_dead_process_left_is_swept(cache, source, tmp_path):
    cache.ensure(cache.path(source.add(4)[0]))
    stale = cache.root / ".incoming-old"
    stale.mkdir()
    os.utime(stale, (0, 0))
    again = DiskCache(cache.root, source, 1 << 20)
    assert not stale.exists()
    assert again.stats().adapters == 1
