"""Fetches before loads: shared, cancelled when nobody wants them, and no load waits for them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from openlora.adapters.adapter_source import Cancelled
from openlora.adapters.lora_set import LoRASet
from openlora.engine.adapter_loads import MAX_FETCHES
from openlora.engine.scheduler import Wait
from openlora.errors import AdapterFailed
from tests.engine.manager_bench import Bench

WAIT_S = 30


class Far:
    """What lies elsewhere: names that begin with ``far``, until they are let through."""

    def __init__(self) -> None:
        self.here: set[Path] = set()
        self.fetched: list[str] = []
        self.cancelled: list[str] = []
        self.gate = threading.Event()
        self.error: Exception | None = None

    def is_missing(self, path: Path) -> bool:
        return path.name.startswith("far") and path not in self.here

    def fetch(self, path: Path, cancelled: threading.Event) -> None:
        self.fetched.append(path.name)
        while not self.gate.wait(0.002):
            if cancelled.is_set():
                self.cancelled.append(path.name)
                raise Cancelled
        if self.error is not None:
            raise self.error
        self.here.add(path)


@pytest.fixture
def far():
    found = Far()
    yield found
    found.gate.set()


@pytest.fixture
def bench(far):
    return Bench(pages=(32,) * 4, is_missing=far.is_missing, fetch=far.fetch)


def until(is_true) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_is_here_does_not_wait_for_what_is_fetched(bench, far):
    names = [f"far{i}" for i in range(3 * MAX_FETCHES)]
    bench.register(*(f"{name}-1-1-1-1" for name in names), "near-1-1-1-1")
    waiting = [bench.want(**{name: 1.0}) for name in names]
    near = bench.want(near=1.0)
    until(lambda: bench.manager.poll())
    assert isinstance(bench.acquire(near), LoRASet)
    assert all(bench.acquire(sequence) is Wait.LOADING for sequence in waiting)
    assert len(far.fetched) == MAX_FETCHES
    far.gate.set()

    def all_have_pages() -> bool:
        # Each as soon as it may: those that are staged keep others from being loaded.
        assert bench.load_all() == []
        waiting[:] = [s for s in waiting if not isinstance(bench.acquire(s), LoRASet)]
        return not waiting

    until(all_have_pages)
    assert len(far.here) == len(names)


def test_all_who_wait_share_one_fetch(bench, far):
    bench.register("far-1-1-1-1")
    sequences = [bench.want(far=1.0) for _ in range(4)]
    far.gate.set()
    bench.load_all()
    assert far.fetched == ["far-1-1-1-1"]
    assert all(isinstance(bench.acquire(sequence), LoRASet) for sequence in sequences)


def test_a_fetch_ends_with_the_last_who_wanted_it(bench, far):
    bench.register("far-1-1-1-1")
    first, second = bench.want(far=1.0), bench.want(far=1.0)
    until(lambda: far.fetched)
    bench.manager.drop(first.sequence_id, first.adapters)
    assert not far.cancelled
    bench.manager.drop(second.sequence_id, second.adapters)
    until(lambda: far.cancelled)
    # Somebody comes before that is known: it begins anew.
    third = bench.want(far=1.0)
    far.gate.set()
    until(lambda: bench.load_all() == [] and isinstance(bench.acquire(third), LoRASet))


def test_a_name_that_goes_during_its_fetch_leaves_nothing(bench, far):
    bench.register("far-1-1-1-1")
    sequence = bench.want(far=1.0)
    until(lambda: far.fetched)
    bench.manager.unregister("far")
    bench.manager.drop(sequence.sequence_id, sequence.adapters)
    ((key, error),) = bench.manager.poll(WAIT_S)
    assert (error, far.cancelled) == (None, ["far-1-1-1-1"])
    with pytest.raises(KeyError):
        bench.manager.is_loading(key)


def test_one_that_was_queued_is_never_begun(bench, far):
    names = [f"far{i}" for i in range(MAX_FETCHES + 1)]
    bench.register(*(f"{name}-1-1-1-1" for name in names))
    *_, last = [bench.want(**{name: 1.0}) for name in names]
    bench.manager.drop(last.sequence_id, last.adapters)
    far.gate.set()
    bench.load_all()
    until(lambda: len(far.here) == MAX_FETCHES)
    assert f"{names[-1]}-1-1-1-1" not in far.fetched


def test_a_fetch_that_fails_is_told_to_its_requests(bench, far):
    bench.register("far-1-1-1-1")
    far.error, _ = AdapterFailed("the store is away"), far.gate.set()
    sequence = bench.want(far=1.0)
    (error,) = bench.load_all()
    assert "the store is away" in error.message
    assert bench.manager.users_of(sequence.adapters[0][0]) == (sequence.sequence_id,)
