"""Residency: LRU, pins, and pages that an unfinished step names."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from openlora.adapters.lora_set import LoRASet
from openlora.engine.adapter_manager import MAX_STAGED
from openlora.engine.scheduler import Wait
from openlora.errors import AdapterFailed, InternalError, UnknownAdapter
from tests.engine.fake_device import load_fake
from tests.engine.manager_bench import WAIT_S, Bench


def test_a_request_waits_for_loading_and_then_names_pages_that_hold_its_adapter():
    bench = Bench()
    bench.register("rose-1-0-2-0")
    sequence = bench.want(rose=0.5)
    assert bench.acquire(sequence) in (Wait.LOADING,)
    assert bench.load_all() == []
    lora_set = bench.acquire(sequence)
    assert [len(site) for site in lora_set.pages] == [1, 0, 2, 0]
    for site, entries in enumerate(lora_set.pages):
        for page, weight in entries:
            assert bench.content[site, page] == "rose"
            assert weight == 0.5
    assert bench.manager.resident == ("rose",)


def test_the_longest_unused_adapter_is_evicted_and_one_in_use_never():
    bench = Bench()
    bench.register("a-1-1-1-1", "b-1-1-1-1", "c-1-1-1-1")
    first, second = bench.run(a=1.0), bench.run(b=1.0)
    third = bench.want(c=1.0)
    bench.load_all()
    assert bench.acquire(third) is Wait.NO_ROOM
    epoch = bench.manager.room_epoch
    bench.end(second)
    assert bench.manager.room_epoch != epoch
    bench.end(first)
    assert bench.manager.resident == ("a", "b")
    bench.end(bench.run(a=1.0))
    assert isinstance(bench.acquire(third), LoRASet)
    assert bench.manager.resident == ("a", "c")


def test_an_adapter_that_others_wait_for_is_kept_over_an_idle_one():
    bench = Bench()
    bench.register("a-1-1-1-1", "b-1-1-1-1", "c-1-1-1-1")
    bench.end(bench.run(a=1.0))
    bench.end(bench.run(b=1.0))
    bench.want(a=1.0)  # in the queue
    bench.run(c=1.0)
    assert bench.manager.resident == ("a", "c")


def test_nothing_is_evicted_where_that_would_not_make_enough_room():
    bench = Bench()
    bench.register("a-1-1-1-1", "b-1-1-1-1", "big-2-2-2-2")
    bench.run(a=1.0)
    bench.end(bench.run(b=1.0))
    big = bench.want(big=1.0)
    bench.load_all()
    assert bench.acquire(big) is Wait.NO_ROOM
    assert bench.manager.resident == ("a", "b")


def test_pages_stay_until_the_last_step_that_names_them_is_done():
    bench = Bench(pages=(1, 1, 1, 1))
    bench.register("a-1-1-1-1", "b-1-1-1-1")
    first = bench.run(a=1.0)
    first.last_step = 7
    bench.manager.complete(6)
    bench.end(first)
    second = bench.want(b=1.0)
    bench.load_all()
    assert bench.acquire(second) is Wait.NO_ROOM
    epoch = bench.manager.room_epoch
    bench.manager.complete(7)
    assert bench.manager.room_epoch != epoch
    assert isinstance(bench.acquire(second), LoRASet)


def test_an_ensemble_gets_all_its_adapters_or_none():
    bench = Bench()
    bench.register("a-1-1-1-1", "b-1-1-1-1", "c-1-1-1-1")
    held = bench.run(c=1.0)
    both = bench.want(a=0.5, b=0.5)
    bench.load_all()
    assert bench.acquire(both) is Wait.NO_ROOM
    assert not any(bench.pool.pins(owner) for owner in bench.pool.owners() if owner[0] != "c")
    bench.end(held)
    lora_set = bench.acquire(both)
    assert [len(site) for site in lora_set.pages] == [2, 2, 2, 2]


def test_equal_content_and_weights_are_one_key_in_any_order():
    bench = Bench(pages=(4, 4, 4, 4))
    bench.register("a-1-1-1-1", "b-1-1-1-1")
    bench.manager.register("alias", Path("/elsewhere/a-1-1-1-1"))
    keys = []
    for mix in ({"a": 0.5, "b": 2.0}, {"b": 2.0, "a": 0.5}, {"b": 2.0, "alias": 0.5}):
        sequence = bench.want(**mix)
        bench.load_all()
        keys.append(bench.acquire(sequence).key)
    assert len(set(keys)) == 1
    other = bench.want(a=2.0, b=0.5)
    assert bench.acquire(other).key != keys[0]


def test_a_failed_load_is_told_once_and_tried_again_for_the_next_request():
    bench = Bench()
    bench.register("broken-1-1-1-1")
    sequence = bench.want(broken=1.0)
    (error,) = bench.load_all()
    assert isinstance(error, AdapterFailed)
    bench.manager.drop(sequence.sequence_id, sequence.adapters)
    bench.want(broken=1.0)
    assert len(bench.load_all()) == 1


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (FileNotFoundError("no such file"), AdapterFailed, "no such file"),
        (ZeroDivisionError("oops"), InternalError, "oops"),
    ],
)
def test_any_failure_of_a_load_is_an_error_of_its_requests(raised, error, words):
    def load(_):
        raise raised

    bench = Bench(load=load)
    bench.register("a-1-1-1-1")
    bench.want(a=1.0)
    (got,) = bench.load_all()
    assert isinstance(got, error)
    assert words in got.message


def test_loads_ahead_are_bounded_and_go_on_as_they_are_taken():
    bench = Bench(pages=(99, 99, 99, 99))
    names = [f"n{i}" for i in range(MAX_STAGED + 3)]
    bench.register("keep-1-1-1-1", *(f"{name}-1-1-1-1" for name in names))
    bench.run(keep=1.0)
    sequences = [bench.want(**{name: 1.0}) for name in names]
    bench.load_all()
    outcomes = [bench.acquire(sequence) for sequence in sequences]
    assert [o is Wait.LOADING for o in outcomes] == [False] * MAX_STAGED + [True] * 3
    bench.load_all()
    assert all(isinstance(bench.acquire(s), LoRASet) for s in sequences[MAX_STAGED:])


def test_a_full_staging_area_cannot_stop_everything():
    bench = Bench(pages=(2, 2, 2, 2))
    names = [f"n{i}" for i in range(2 * MAX_STAGED)]
    bench.register(*(f"{name}-1-1-1-1" for name in names))
    sequences = [bench.want(**{name: 1.0}) for name in names[:MAX_STAGED]]
    bench.load_all()
    pair = bench.want(**{names[0]: 1.0, names[-1]: 1.0})
    bench.load_all()
    assert isinstance(bench.acquire(pair), LoRASet)
    assert sequences


def test_dropping_the_last_request_drops_what_was_staged_or_wanted():
    bench = Bench()
    bench.register("a-1-1-1-1")
    sequence = bench.want(a=1.0)
    bench.load_all()
    bench.manager.drop(sequence.sequence_id, sequence.adapters)
    bench.manager.check_integrity()
    assert bench.manager.resident == ()


def test_an_adapter_unregistered_while_loading_or_running_goes_when_it_is_done():
    gate = threading.Event()

    def load(path):
        assert gate.wait(WAIT_S)
        return load_fake(path)

    bench = Bench(load=load)
    bench.register("a-1-1-1-1")
    sequence = bench.want(a=1.0)
    bench.manager.unregister("a")
    with pytest.raises(UnknownAdapter, match="'a'"):
        bench.want(a=1.0)
    gate.set()
    bench.load_all()
    assert isinstance(bench.acquire(sequence), LoRASet)
    sequence.last_step = 3
    bench.end(sequence)
    assert bench.manager.resident == ("a",)
    bench.manager.complete(3)
    assert bench.manager.resident == ()
    assert bench.pool.num_free == (2, 2, 2, 2)


def test_registering_the_same_again_keeps_it_and_another_path_replaces_it():
    bench = Bench()
    bench.register("a-1-1-1-1")
    bench.end(bench.run(a=1.0))
    bench.register("a-1-1-1-1")
    assert bench.manager.resident == ("a",)
    bench.manager.register("a", Path("/adapters/new-1-1-1-1"))
    assert bench.manager.resident == ()
    assert bench.run(a=1.0)
    assert set(bench.content.values()) >= {"new"}


@pytest.mark.parametrize("is_usable", [True, False])
def test_an_adapter_given_up_while_it_loads_is_forgotten(is_usable: bool):
    may_end = threading.Event()

    def load(path: Path):
        may_end.wait(WAIT_S)
        if not is_usable:
            raise AdapterFailed("no")
        return load_fake(path)

    bench = Bench(load=load)
    bench.register("rose-1-1-1-1")
    sequence = bench.want(rose=1.0)
    bench.manager.unregister("rose")
    bench.manager.drop(sequence.sequence_id, sequence.adapters)
    may_end.set()
    ((key, error),) = bench.manager.poll(WAIT_S)
    assert (error is None) == is_usable
    assert bench.manager.users_of(key) == ()
    bench.manager.check_integrity()
    assert not bench.manager._by_key


def test_what_the_host_tier_holds_is_staged_at_once():
    read = []

    def load(path):
        read.append(path.name)
        return load_fake(path)

    held: set[str] = set()
    bench = Bench(
        pages=(1, 1, 1, 1),
        load=load,
        cached=lambda path: load_fake(path) if path.name in held else None,
    )
    bench.register("a-1-1-1-1", "b-1-1-1-1")
    bench.end(bench.run(a=1.0))
    held.add("b-1-1-1-1")
    second = bench.want(b=1.0)
    # Without a look at the loads: it runs in the very step that it came in.
    lora_set = bench.acquire(second)
    assert isinstance(lora_set, LoRASet)
    assert bench.content[0, lora_set.pages[0][0][0]] == "b"
    assert bench.manager.poll() == [("b#2", None)]
    assert read == ["a-1-1-1-1"]


def test_what_the_host_tier_holds_may_still_not_fit_the_pages():
    bench = Bench(pages=(1, 1, 1, 1), cached=load_fake)
    bench.register("big-2-1-1-1")
    bench.want(big=1.0)
    ((key, error),) = bench.manager.poll()
    assert key == "big#1"
    assert isinstance(error, AdapterFailed)


def test_the_number_staged_is_the_host_memory_s():
    started = threading.Semaphore(0)

    def load(path):
        started.release()
        return load_fake(path)

    bench = Bench(pages=(1, 1, 1, 1), load=load, max_staged=3)
    bench.register(*(f"a{i}-1-1-1-1" for i in range(6)))
    bench.run(a0=1.0)
    for i in range(1, 6):
        bench.want(**{f"a{i}": 1.0})
    for _ in range(4):
        assert started.acquire(timeout=WAIT_S)
    bench.load_all()
    assert not started.acquire(timeout=0.05)
