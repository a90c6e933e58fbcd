"""Locks by name: shared by readers, alone for one, and gone with what they guard."""

from __future__ import annotations

import contextlib
import os
import threading

from openlora.adapters.content_locks import ContentLocks


def test_many_share_and_one_is_alone(tmp_path):
    locks = ContentLocks(tmp_path / "locks")
    with locks.shared("a"), locks.shared("a"):
        with locks.alone_now("a") as is_mine:
            assert not is_mine
        with locks.alone_now("b") as is_mine:
            assert is_mine
    with locks.alone("a"), locks.alone_now("a") as is_mine:
        assert not is_mine
    with locks.alone_now("a") as is_mine:
        assert is_mine


def test_one_that_was_removed_while_it_was_waited_for_is_taken_anew(tmp_path):
    locks, order = ContentLocks(tmp_path), []
    waiting = threading.Event()

    def want():
        waiting.set()
        with locks.shared("a"):
            order.append("taken")
            assert (tmp_path / "a").exists()

    with locks.alone("a"):
        thread = threading.Thread(target=want)
        thread.start()
        waiting.wait()
        locks.remove("a")
        order.append("removed")
    thread.join()
    assert order == ["removed", "taken"]


def test_no_file_stays_open(tmp_path):
    locks = ContentLocks(tmp_path / "new" / "locks")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with locks.alone("a"), locks.alone_now("a"):
            pass
        with contextlib.suppress(ValueError), locks.shared("a"):
            raise ValueError
    assert len(os.listdir("/proc/self/fd")) == before
