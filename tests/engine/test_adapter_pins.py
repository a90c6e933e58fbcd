"""Pinned adapters: loaded ahead, kept in pages, and never more than half of them."""

from __future__ import annotations

from openlora.adapters.lora_set import LoRASet
from tests.engine.manager_bench import Bench


def pinned(bench: Bench, *names: str) -> None:
    bench.manager.set_pins(names)
    bench.load_all()


def held(bench: Bench) -> tuple[str, ...]:
    keys = bench.manager._pins.keys
    return tuple(key.split("#")[0] for key in keys if bench.manager._resident.is_held(key))


def test_a_pinned_adapter_is_in_pages_before_anybody_asks_and_stays():
    bench = Bench(pages=(2,) * 4)
    bench.register("a-1-1-1-1", "b-1-1-1-1", "c-1-1-1-1", "d-1-1-1-1")
    pinned(bench, "a")
    assert bench.manager.resident == ("a",)
    for name in "bcd":
        bench.end(bench.run(**{name: 1.0}))
        assert "a" in bench.manager.resident
    bench.manager.set_pins(())
    assert "a" in bench.manager.resident  # until somebody needs its pages
    bench.end(bench.run(b=1.0))
    bench.end(bench.run(c=1.0))
    assert "a" not in bench.manager.resident


def test_pins_take_half_of_the_pages_and_what_is_more_is_not_pinned(caplog):
    bench = Bench(pages=(4,) * 4)
    bench.register("a-1-1-1-1", "b-1-1-1-1", "c-1-1-1-1")
    pinned(bench, "a", "b", "c")
    assert "adapter c is not pinned" in caplog.text
    bench.register("big-4-4-4-4", "half-2-2-2-2")
    sequence = bench.want(half=1.0)
    bench.load_all()
    assert isinstance(bench.acquire(sequence), LoRASet)
    assert set(bench.manager.resident) >= {"a", "b", "half"}


def test_a_pinned_adapter_waits_for_pages_that_are_in_use():
    bench = Bench(pages=(2,) * 4)
    bench.register("a-1-1-1-1", "b-2-2-2-2")
    running = bench.run(b=1.0)
    pinned(bench, "a")
    assert bench.manager.resident == ("b",)
    bench.end(running)
    bench.manager.poll()
    assert bench.manager.resident == ("a",)
    bench.want(b=1.0)
    (error,) = bench.load_all()
    assert "beside pinned adapters" in error.message


def test_what_does_not_fit_beside_pins_is_refused_and_what_waits_already_goes_first():
    bench = Bench(pages=(4,) * 4)
    bench.register("a-2-2-2-2", "big-3-3-3-3")
    waiting = bench.want(big=1.0)
    bench.load_all()
    pinned(bench, "a")
    assert isinstance(bench.acquire(waiting), LoRASet)
    bench.end(waiting)
    bench.manager.poll()
    bench.load_all()
    assert bench.manager.resident == ("a",)
    later = bench.want(big=1.0)
    error = bench.manager.misfit(later)
    assert "more pages than the pool has beside pinned adapters (qkv: 3 of 2" in error.message
    assert "unpin some" in error.message
    bench.manager.set_pins(())
    assert bench.manager.misfit(later) is None


def test_a_pin_that_has_to_wait_wakes_nobody_who_waits_for_room():
    bench = Bench(pages=(4,) * 4)
    bench.register("a-2-2-2-2", "big-3-3-3-3")
    bench.want(big=1.0)
    bench.load_all()
    pinned(bench, "a")
    epoch = bench.manager.room_epoch
    for _ in range(3):
        bench.manager.poll()
    assert bench.manager.resident == ("a",)
    assert held(bench) == ()
    assert bench.manager.room_epoch == epoch


def test_an_ensemble_that_waits_already_goes_before_a_pin_that_its_parts_would_fit_beside():
    bench = Bench(pages=(4,) * 4)
    bench.register("a-2-2-2-2", "b-2-2-2-2", "c-2-2-2-2")
    waiting = bench.want(b=1.0, c=1.0)
    bench.load_all()
    pinned(bench, "a")
    assert isinstance(bench.acquire(waiting), LoRASet)
    bench.end(waiting)
    bench.manager.poll()
    bench.load_all()
    assert held(bench) == ("a",)
    assert "beside pinned" in bench.manager.misfit(bench.want(b=1.0, c=1.0)).message


def test_a_pinned_one_that_can_never_fit_is_said(caplog):
    bench = Bench(pages=(2,) * 4)
    bench.register("big-3-3-3-3")
    pinned(bench, "big")
    assert "pinned adapter big is not loaded: adapter 'big' takes more pages" in caplog.text
    assert held(bench) == ()


def test_one_that_fails_is_said_and_tried_again(caplog):
    bench = Bench()
    bench.register("broken-1-1-1-1", "a-1-1-1-1")
    bench.manager.set_pins(("broken", "a", "unknown"))
    assert len(bench.load_all()) == 1
    assert "pinned adapter broken is not loaded" in caplog.text
    assert bench.manager.resident == ("a",)
    assert not bench.manager.has_pins_under_way()
    bench.manager.set_pins(("broken", "a"))
    assert bench.manager.has_pins_under_way()
    assert len(bench.load_all()) == 1


def test_a_pinned_name_that_goes_leaves_nothing():
    bench = Bench()
    bench.register("a-1-1-1-1")
    pinned(bench, "a")
    bench.manager.unregister("a")
    bench.manager.check_integrity()
    assert bench.manager.resident == ()
    assert not any(bench.pool.owners())
