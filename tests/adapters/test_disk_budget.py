"""The disk tier's budget and order, by one process and by several, and what keeping them costs."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlora.adapters import disk_index
from openlora.adapters.adapter_source import Evicted
from openlora.adapters.disk_cache import DiskCache
from openlora.adapters.disk_index import RESCAN_BROUGHT, RESCAN_S, is_content_hash
from openlora.adapters.peft_format import inspect_adapter
from openlora.errors import AdapterFailed
from tests.adapters.folder_source import FolderSource
from tests.adapters.peft_dirs import write_adapter


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Of adapters that are all of one size."""
    return FolderSource(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def contents(source):
    hashes = []
    for number in range(60):
        path = write_adapter(source.root / "new", base_model_name_or_path=f"tiny/{number:02}")
        hashes.append(inspect_adapter(path).hash)
        path.rename(source.root / hashes[-1])
    return hashes


@pytest.fixture(scope="module")
def size(source, contents):
    return sum(path.stat().st_size for path in (source.root / contents[0]).iterdir())


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(disk_index, "time", clock)
    return clock


def here(root):
    """One system call: what is placed or goes meanwhile is in it or is not."""
    return {name for name in os.listdir(root) if is_content_hash(name)}


def ensure(cache, *names):
    for name in names:
        cache.ensure(cache.path(name))


def read(cache, name):
    with cache.reading(cache.path(name)):
        pass


def agrees(cache, size):
    """Whether what it tells of itself is what is there."""
    stats = cache.stats()
    there = here(cache.root)
    return set(stats.names) == there and stats.bytes_used == len(there) * size


@given(wants=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_longest_unused_goes_whichever_process_used_it(source, contents, size, wants):
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_index, "RESCAN_S", 0.0)
        caches = [DiskCache(Path(root) / "cache", source, 3 * size, back_off_s=()) for _ in "ab"]
        expected: list[str] = []
        for who, which in wants:
            name = contents[which]
            if name in expected:
                read(caches[who], name)
                expected.remove(name)
            else:
                ensure(caches[who], name)
            expected = [*expected, name][-3:]
            assert here(caches[who].root) == set(expected)
            assert caches[who].stats().bytes_used <= 3 * size


def test_a_use_by_another_process_is_seen_without_looking_at_all(source, contents, size, tmp_path):
    one = DiskCache(tmp_path / "cache", source, 4 * size)
    ensure(one, *contents[:4])
    other = DiskCache(tmp_path / "cache", source, 4 * size)
    read(other, contents[0])
    read(one, contents[1])
    read(other, contents[2])
    ensure(one, contents[4])
    assert here(one.root) == {contents[i] for i in (0, 1, 2, 4)}
    ensure(one, contents[5])
    assert here(one.root) == {contents[i] for i in (1, 2, 4, 5)}
    assert one.stats().names == tuple(contents[i] for i in (1, 2, 4, 5))


def test_what_another_process_brought_counts_after_the_interval(
    source, contents, size, tmp_path, clock
):
    (tmp_path / "cache").mkdir()
    one, other = (DiskCache(tmp_path / "cache", source, 3 * size) for _ in "ab")
    ensure(one, *contents[:2])
    ensure(other, *contents[2:4])
    assert len(here(one.root)) == 4
    assert one.stats().adapters == other.stats().adapters == 2
    clock.now += RESCAN_S
    ensure(one, contents[4])
    assert here(one.root) == set(contents[2:5])
    assert agrees(one, size)


def test_what_another_process_brought_counts_sooner_where_much_is_brought(
    source, contents, size, tmp_path, clock
):
    (tmp_path / "cache").mkdir()
    budget = RESCAN_BROUGHT + 2
    one, other = (DiskCache(tmp_path / "cache", source, budget * size) for _ in "ab")
    ensure(one, *contents[: RESCAN_BROUGHT - 1])
    ensure(other, *contents[40:44])
    assert len(here(one.root)) > budget
    ensure(one, contents[RESCAN_BROUGHT])
    assert len(here(one.root)) == budget
    assert agrees(one, size)


def test_what_another_process_evicted_is_noticed(source, contents, size, tmp_path, clock):
    one = DiskCache(tmp_path / "cache", source, 3 * size)
    ensure(one, *contents[:3])
    other = DiskCache(tmp_path / "cache", source, 3 * size)
    ensure(other, contents[3])
    assert not one.has(one.path(contents[0]))
    # Before it looks: what it takes for the oldest has gone, and no other one goes for it.
    ensure(one, contents[4])
    assert here(one.root) == set(contents[1:5])
    assert one.stats().names == tuple(contents[i] for i in (1, 2, 4))
    assert one.stats().evictions == 0
    clock.now += RESCAN_S
    one.trim()
    assert here(one.root) == set(contents[2:5])
    assert agrees(one, size)
    ensure(other, *contents[5:8])
    assert here(one.root) == set(contents[5:8])
    clock.now += RESCAN_S
    one.trim()
    assert agrees(one, size)
    with pytest.raises(Evicted):
        read(one, contents[2])


def test_a_full_disk_is_made_room_on_also_of_what_others_brought(
    source, contents, size, tmp_path, clock, monkeypatch
):
    (tmp_path / "cache").mkdir()
    one, other = (DiskCache(tmp_path / "cache", source, 60 * size) for _ in "ab")
    ensure(other, *contents[:4])
    assert one.stats().adapters == 0
    monkeypatch.setattr(source, "errors", [OSError(errno.ENOSPC, "No space left on device")])
    monkeypatch.setattr(one, "_back_off_s", (0.0,))
    ensure(one, contents[4])
    assert here(one.root) == set(contents[1:5])


class Looks:
    """Counts looks at the disk: a listing, and all that it shows, and files' properties."""

    def __init__(self, monkeypatch):
        self.counts = Counter()
        for name in ("stat", "lstat", "listdir", "scandir"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name, call):
        def counted(*args, **kwargs):
            self.counts[name] += 1
            return call(*args, **kwargs)

        return counted

    def of(self, action):
        self.counts.clear()
        action()
        return dict(self.counts)


def test_a_fetch_looks_no_more_often_where_more_adapters_are(
    source, contents, size, tmp_path, clock, monkeypatch
):
    looks, found = Looks(monkeypatch), []
    for count in (5, 50):
        cache = DiskCache(tmp_path / f"cache{count}", source, count * size)
        ensure(cache, *contents[:count])
        clock.now += RESCAN_S
        cache.trim()
        fetch = looks.of(lambda: ensure(cache, contents[55]))  # noqa: B023 - called at once
        clock.now += RESCAN_S
        rescan = looks.of(cache.trim)
        found.append((fetch, rescan, looks.of(cache.trim)))
        assert cache.stats().evictions == 1
    assert found[0] == found[1]
    fetch, rescan, nothing = found[0]
    assert fetch.get("listdir", 0) <= 3  # of directories of one adapter
    assert fetch["stat"] < 30
    assert rescan == {"listdir": 1}
    assert nothing == {}


def test_the_budget_holds_at_every_return_of_many_threads(source, contents, size, tmp_path):
    cache = DiskCache(tmp_path / "cache", source, 12 * size)
    fetched_before, seen = len(source.fetches), []

    def want(seed):
        choose = random.Random(seed)
        for _ in range(25):
            ensure(cache, contents[choose.randrange(30)])
            seen.append(len(here(cache.root)))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(want, range(8)))
    assert max(seen) <= 12
    # None went in vain: from when it was full, it stayed so.
    assert len(here(cache.root)) == 12
    assert agrees(cache, size)
    assert len(source.fetches) - fetched_before - cache.stats().evictions == 12


def test_one_that_is_read_stays_while_many_threads_fetch(source, contents, size, tmp_path):
    cache = DiskCache(tmp_path / "cache", source, 6 * size)
    ensure(cache, contents[0])
    with cache.reading(cache.path(contents[0])), ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: ensure(cache, name), contents[1:40]))
        assert cache.has(cache.path(contents[0]))
    assert agrees(cache, size)


def test_two_threads_over_the_budget_evict_no_more_than_one_would(
    source, contents, size, tmp_path, monkeypatch
):
    cache = DiskCache(tmp_path / "cache", source, 3 * size)
    ensure(cache, *contents[:3])
    evicting, go_on, rename = threading.Event(), threading.Event(), os.rename

    def slow(path, target):
        if ".trash-" in str(target) and not evicting.is_set():
            evicting.set()
            assert go_on.wait(10)
        rename(path, target)

    monkeypatch.setattr(os, "rename", slow)
    threads = [threading.Thread(target=ensure, args=(cache, contents[3]))]
    threads[0].start()
    assert evicting.wait(10)
    threads.append(threading.Thread(target=cache.trim))
    threads[1].start()
    threads[1].join(0.1)  # it has to wait; one that does not has evicted by then
    go_on.set()
    for thread in threads:
        thread.join()
    assert here(cache.root) == set(contents[1:4])


def test_where_no_other_may_go_what_nobody_waits_for_goes_itself(source, contents, size, tmp_path):
    cache = DiskCache(tmp_path / "cache", source, 2 * size)
    for name in contents[:2]:
        cache.ensure(cache.path(name), keep_s=60.0)
    ensure(cache, contents[2])
    assert here(cache.root) == set(contents[:2])
    cache.ensure(cache.path(contents[3]), keep_s=60.0)
    assert here(cache.root) == {contents[0], contents[1], contents[3]}
    assert agrees(cache, size)


def test_what_could_not_be_placed_takes_nothing_of_the_budget(
    source, contents, size, tmp_path, monkeypatch
):
    cache = DiskCache(tmp_path / "cache", source, 2 * size)

    def fail(path, target):
        raise PermissionError("not here")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(AdapterFailed, match="cannot be written: not here"):
            ensure(cache, contents[0])
    assert {name[0] for name in os.listdir(cache.root)} == {"."}
    ensure(cache, *contents[1:3])
    assert here(cache.root) == set(contents[1:3])
    assert cache.stats().evictions == 0
