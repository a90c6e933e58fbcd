"""What is remembered of the disk tier, while other threads look, place and evict."""

from __future__ import annotations

import os
import threading

import pytest

from openlora.adapters import disk_index
from openlora.adapters.disk_index import DiskIndex, size_of

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def place(root, name, size=10, used_ns=1):
    (root / name).mkdir()
    (root / name / "file").write_bytes(bytes(size))
    os.utime(root / name, ns=(used_ns, used_ns))


@pytest.fixture
def index(tmp_path):
    return DiskIndex(tmp_path)


def during_a_listing(monkeypatch, action):
    """Have ``action`` run when the names were read and nothing was made of them."""
    listdir = os.listdir

    def listed(path):
        names = listdir(path)
        monkeypatch.setattr(os, "listdir", listdir)
        action()
        return names

    monkeypatch.setattr(os, "listdir", listed)


def test_what_is_there_is_found_in_order_and_what_went_is_forgotten(index, tmp_path):
    place(tmp_path, A, 10, used_ns=3)
    place(tmp_path, B, 20, used_ns=2)
    (tmp_path / ".locks").mkdir()
    index.rescan()
    assert index.snapshot() == [(B, 20), (A, 10)]
    assert index.num_bytes == 30
    (tmp_path / B).rename(tmp_path / ".trash")
    index.rescan()
    assert index.num_bytes == 30  # not so soon
    index.rescan(at_once=True)
    assert index.snapshot() == [(A, 10)]
    assert index.num_bytes == 10
    assert size_of(tmp_path / A) == 10


def test_what_is_about_to_be_placed_counts_and_does_not_go(index):
    index.expect(A, 10)
    assert (index.num_bytes, index.snapshot(), index.pop_oldest()) == (10, [], None)
    index.placed(A, 10, used_ns=5)
    assert (index.num_bytes, index.snapshot()) == (10, [(A, 10)])
    index.expect(B, 10)
    index.forget(B)
    assert index.num_bytes == 10


def test_the_order_follows_uses_of_this_process_and_those_that_are_found(index):
    for number, name in enumerate((A, B, C)):
        index.placed(name, 1, used_ns=number)
    index.used(A, 10)
    oldest = index.pop_oldest()
    assert oldest.name == B
    index.put_back(oldest, used_ns=20)
    index.put_back(oldest)  # no second time
    assert len(index._queue) == 3
    names = [entry.name for entry in iter(index.pop_oldest, None)]
    assert names == [C, A, B]


def test_one_that_came_anew_is_not_taken_for_what_it_was(index):
    index.placed(A, 1, used_ns=1)
    old = index.pop_oldest()
    index.placed(A, 1, used_ns=2)
    index.forget(A, old)
    index.put_back(old)
    assert [entry.used_ns for entry in iter(index.pop_oldest, None)] == [2]
    assert index.num_bytes == 1


def test_only_the_first_reading_is_what_it_was_fetched_for(index):
    index.placed(A, 1, used_ns=1)
    assert not index.used(A, 2)
    assert index.keep(A, 100.0)
    assert index.used(A, 3)
    assert not index.used(A, 4)
    assert not index.keep(B, 100.0)
    assert not index.used(B, 5)


def test_what_is_placed_while_others_look_stays_known(index, tmp_path, monkeypatch):
    def placed():
        place(tmp_path, A)
        index.placed(A, 10, used_ns=1)

    during_a_listing(monkeypatch, placed)
    index.rescan(at_once=True)
    assert index.snapshot() == [(A, 10)]


def test_what_is_evicted_while_others_look_stays_forgotten(index, tmp_path, monkeypatch):
    place(tmp_path, A)
    index.placed(A, 10, used_ns=1)

    def evicted():
        index.forget(A)  # its directory is still there when its size is asked for

    during_a_listing(monkeypatch, evicted)
    index.rescan(at_once=True)
    assert (index.snapshot(), index.num_bytes) == ([], 0)


def test_what_is_about_to_be_placed_is_not_found_as_another_s(index, tmp_path):
    index.expect(A, 10)
    place(tmp_path, A)
    index.rescan(at_once=True)
    assert (index.snapshot(), index.num_bytes) == ([], 10)


def test_nobody_waits_for_another_s_look_nor_repeats_it(index, monkeypatch):
    looking, go_on, looks = threading.Event(), threading.Event(), []
    listdir = os.listdir

    def slow(path):
        looks.append(path)
        looking.set()
        assert go_on.wait(10)
        return listdir(path)

    monkeypatch.setattr(disk_index.os, "listdir", slow)
    thread = threading.Thread(target=index.rescan)
    thread.start()
    assert looking.wait(10)
    index.rescan(at_once=True)
    go_on.set()
    thread.join()
    index.rescan()
    assert len(looks) == 1


def test_what_others_evict_leaves_nothing_behind(index, tmp_path):
    for _ in range(5):
        place(tmp_path, A)
        index.rescan(at_once=True)
        (tmp_path / A).rename(tmp_path / ".trash")
        index.rescan(at_once=True)
        (tmp_path / ".trash" / "file").unlink()
        (tmp_path / ".trash").rmdir()
    assert index._queue == []
