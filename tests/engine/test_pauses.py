"""Whose the room is that comes free while some pause for others, and that every pause ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openlora.engine import adapter_turns
from openlora.engine.adapter_turns import PAUSE_TURNS, TURN_STEPS
from openlora.engine.sequence import Status
from openlora.engine.waiting import ROOM_PATIENCE_STEPS
from tests.engine.fake_device import fake_engine
from tests.engine.requests import drain, ids, request
from tests.engine.scheduler_bench import Bench, Slots, running

PAUSE_STEPS = round(PAUSE_TURNS * TURN_STEPS)


def one_pauses(bench, n=999):
    """Two adapters fit: "a"'s sequence pauses for one with "c", and "b"'s ends soon."""
    paused = bench.add(adapter="a", n=999)
    bench.add(adapter="b", n=TURN_STEPS + 8)
    for _ in range(TURN_STEPS):
        bench.step()
    bench.add(adapter="c", n=n)
    while paused.paused_at_step < 0:
        bench.step()
    assert running(bench) == {2, 3}
    return paused


def test_what_comes_free_is_a_new_one_s_before_it_is_anybody_s_who_pauses():
    bench = Bench(slots=Slots(size=2), num_blocks=999)
    paused = one_pauses(bench)
    while 2 not in bench.finished:
        bench.step()
    new = bench.add(adapter="b", n=2)
    bench.step()
    assert running(bench) == {3, new.sequence_id}
    bench.step()
    assert running(bench) == {3}
    bench.step()
    assert paused.paused_at_step < 0, "nobody else wanted it"
    bench.step()
    assert running(bench) == {1, 3}


def test_new_batch_work_takes_nothing_from_those_that_pause():
    bench = Bench(slots=Slots(size=2), num_blocks=999)
    one_pauses(bench)
    while 2 not in bench.finished:
        bench.step()
    late = bench.add(adapter="b", n=2, priority="batch")
    bench.step()
    assert running(bench) == {1, 3}
    assert late.status is not Status.RUNNING


def test_behind_a_pause_what_comes_free_is_not_a_new_one_s(monkeypatch):
    """Also where more are wanted meanwhile than take turns."""
    bench = Bench(slots=Slots(size=2), num_blocks=999)
    paused = one_pauses(bench, n=PAUSE_STEPS + 3)
    monkeypatch.setattr(bench.slots, "turn_s", lambda keys: None)
    bench.add(adapter="b", n=999)
    while 3 not in bench.finished:
        bench.step()
    late = bench.add(adapter="d", n=2)
    bench.step()
    assert paused.paused_at_step < 0
    assert late.status is not Status.RUNNING


def test_however_many_new_ones_come_a_pause_has_an_end():
    """None of them has a turn that could be over: what comes free is all there is."""
    bench = Bench(slots=Slots(size=2), num_blocks=999, seqs=6)
    paused = one_pauses(bench, n=4)
    end = paused.paused_at_step + PAUSE_STEPS
    while paused.paused_at_step >= 0:
        assert bench.step_number <= end + 4
        for name in "bd":
            if bench.scheduler.num_waiting < 4:
                bench.add(adapter=name, n=3)
        bench.step()
    assert bench.step_number >= end, "and not before its end, where others want the room"


def test_adapters_that_are_always_in_use_keep_out_nobody_for_ever():
    """More adapters are wanted than take turns, so that nobody makes room for anybody."""
    bench = Bench(slots=Slots(size=2), num_blocks=999, seqs=9)
    paused = one_pauses(bench, n=4)
    until = paused.paused_at_step + ROOM_PATIENCE_STEPS + 8
    popular = {"b": [], "d": []}
    late = set()
    while paused.paused_at_step >= 0 or not late <= set(bench.finished):
        for name, added in popular.items():
            if sum(number not in bench.finished for number in added) < 3:
                added.append(bench.add(adapter=name, n=3).sequence_id)
        bench.step()
        if not late:
            late = {bench.add(adapter=name, n=4).sequence_id for name in "ef"}
        assert paused.paused_at_step < 0 or bench.step_number <= until
        assert bench.step_number <= until + 2 * ROOM_PATIENCE_STEPS
    assert bench.step_number >= until - 8, "each of the three waited for long"


def test_one_that_room_was_made_for_and_one_that_has_waited_for_long_do_not_wait_for_each_other(
    monkeypatch,
):
    bench = Bench(slots=Slots(size=1), num_blocks=999)
    monkeypatch.setattr(bench.slots, "turn_s", lambda keys: 0.0)
    bench.add(adapter="a", n=99)
    bench.step()
    waiter = bench.add(adapter="b", n=4, priority="batch")
    for _ in range(TURN_STEPS - 1):
        bench.step()
    new = bench.add(adapter="c", n=4)
    bench.step()
    bench.scheduler._turns.take(bench.scheduler.running, TURN_STEPS + 2)
    assert not running(bench)
    waiter.parked_at_step -= ROOM_PATIENCE_STEPS + 2 * TURN_STEPS
    bench.step()
    assert running(bench) == {new.sequence_id}
    while new.sequence_id not in bench.finished:
        bench.step()
    bench.step()
    assert running(bench) == {waiter.sequence_id}


def large_one_comes(bench, waits_for_long):
    """One pauses for another, and has the blocks that a large one, which is first, lacks."""
    paused = bench.add(40, adapter="a", n=40, tenant="x")
    for _ in range(TURN_STEPS + 1):
        bench.step()
    waiter = bench.add(4, adapter="b", n=8, tenant="x")
    bench.step()
    if waits_for_long:
        waiter.parked_at_step -= ROOM_PATIENCE_STEPS + 1
    bench.add(100, n=4, tenant="y")
    return paused


@pytest.mark.parametrize("waits_for_long", [False, True])
def test_nobody_waits_for_room_that_is_kept_for_one_that_cannot_start(waits_for_long):
    bench = Bench(slots=Slots(size=1), num_blocks=36, budget=128)
    paused = large_one_comes(bench, waits_for_long)
    bench.step()
    assert paused.turn_began_step == bench.step_number + 1, "it paused and goes on"
    bench.run(200)
    assert set(bench.finished) == {1, 2, 3}


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_an_engine_does_not_stand_still_for_one_that_cannot_start(monkeypatch, steps_ahead):
    monkeypatch.setattr(adapter_turns, "TURN_S", 0.0)
    engine, _ = fake_engine(num_blocks=40, num_pages=(1, 1, 1, 1), steps_ahead=steps_ahead)
    for name in "ab":
        engine.register_adapter(name, f"/adapters/{name}-1-1-1-1")
    prompts = [1] * 40, [2] * 4, [3] * 110
    requests = request(prompts[0], n=70, a=1.0), request(prompts[1], b=1.0), request(prompts[2])
    paused = engine.add(requests[0])
    while engine.stats().steps < TURN_STEPS + 4:
        engine.step()
        engine.wait_for_adapters(5)
    waiter = engine.add(requests[1])
    engine._take_loads(5)
    engine.step()
    assert engine.stats().waiting_for_adapter == 1
    large = engine.add(replace(requests[2], tenant="other"))
    outputs = drain(engine)
    assert [len(ids(outputs[one])) for one in (waiter, large)] == [8, 8]
    assert outputs[paused][-1].finish_reason == "length"
