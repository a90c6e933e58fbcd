"""Turns: who makes way for whom where more adapters are wanted than fit, and who never does."""

from __future__ import annotations

import random

import pytest

from openlora.engine import adapter_turns
from openlora.engine.adapter_fit import TURN_SHARE
from openlora.engine.adapter_turns import NEW_PATIENCE_STEPS, PAUSE_TURNS, TURN_S, TURN_STEPS
from openlora.engine.sequence import Status
from openlora.engine.waiting import ROOM_PATIENCE_STEPS
from tests.engine.fake_device import expected_tokens, fake_engine
from tests.engine.requests import drain, drain_one, ids, request
from tests.engine.scheduler_bench import Bench, Slots, running

PAUSE_STEPS = round(PAUSE_TURNS * TURN_STEPS)


def test_a_new_one_is_let_in_by_the_one_that_has_run_longest():
    bench = Bench(slots=Slots(size=2))
    bench.add(adapter="a", n=99)
    bench.step()
    bench.add(adapter="b", n=99)
    for _ in range(TURN_STEPS):
        bench.step()
    new = bench.add(adapter="c", n=99)
    for _ in range(NEW_PATIENCE_STEPS + 1):
        assert new.status is not Status.RUNNING
        bench.step()
    assert running(bench) == {2, 3}
    assert bench.scheduler.num_parked == 1
    assert bench.scheduler.num_running == 2
    assert bench.scheduler.num_preemptions == 0, "it keeps its blocks"


def test_nobody_pauses_before_its_turn_is_over():
    bench = Bench(slots=Slots(size=1))
    first = bench.add(adapter="a", n=99)
    bench.add(adapter="b", n=99)
    for _ in range(TURN_STEPS):
        bench.step()
        assert running(bench) == {1}
    bench.step()
    assert running(bench) == {2}
    for _ in range(PAUSE_STEPS - 1):
        bench.step()
        assert running(bench) == {2}
    bench.step()
    assert running(bench) == {1}, "and they take turns"
    assert first.paused_at_step == -1


def test_all_who_have_the_adapter_pause_together_and_for_no_fewer():
    bench = Bench(slots=Slots(size=1), num_blocks=99)
    bench.add(adapter="a", n=99)
    for _ in range(TURN_STEPS - 2):
        bench.step()
    bench.add(adapter="a", n=99)
    bench.add(adapter="b", n=99)
    for _ in range(3 * TURN_STEPS):
        bench.step()
        assert running(bench) == {1, 2}, "steps would be less full"
    bench.add(adapter="b", n=99)
    for _ in range(NEW_PATIENCE_STEPS + 1):
        bench.step()
    assert running(bench) == {3, 4}
    assert bench.scheduler.num_parked == 2


def test_many_times_what_fits_run_to_their_ends():
    bench = Bench(slots=Slots(size=1), num_blocks=999)
    for name in "abc":
        bench.add(adapter=name, n=2 * TURN_STEPS)
    for _ in range(2 * TURN_STEPS):
        bench.step()
        assert running(bench) <= {1}
    for _ in range(TURN_STEPS + 1):
        bench.step()
    assert running(bench) == {3}, "two of them are no more than twice as many"


@pytest.mark.parametrize(("turn_s", "step_s"), [(0.0, TURN_S / 50), (5.0, 0.1)])
def test_a_turn_lasts_a_while_and_is_long_beside_what_loads_take(turn_s, step_s):
    bench = Bench(slots=Slots(size=1, load_s=turn_s), num_blocks=999)
    bench.step_s = step_s
    bench.add(adapter="a", n=200)
    bench.add(adapter="b", n=200)
    for _ in range(50):
        bench.step()
        assert running(bench) == {1}
    bench.step()
    assert running(bench) == {2}


def test_where_all_fit_nobody_ever_pauses(monkeypatch):
    def never(*args):
        raise AssertionError("somebody was asked to pause")

    monkeypatch.setattr(adapter_turns.AdapterTurns, "_may_pause", never)
    bench = Bench(slots=Slots(size=3), num_blocks=99)
    for name in "abcabc":
        bench.add(adapter=name, n=4 * TURN_STEPS)
    bench.run()


def test_batch_work_makes_way_first_waits_in_its_place_and_comes_back():
    bench = Bench(slots=Slots(size=2), num_blocks=999)
    bench.add(adapter="a", n=9999)
    batch = bench.add(adapter="b", n=99, priority="batch")
    for _ in range(TURN_STEPS + 1):
        bench.step()
    bench.add(adapter="c", n=9999)
    for _ in range(NEW_PATIENCE_STEPS + 1):
        bench.step()
    assert running(bench) == {1, 3}
    for _ in range(ROOM_PATIENCE_STEPS - 1):
        bench.step()
    assert running(bench) == {1, 3}, "interactive ones need not pause for it so soon"
    bench.step()
    assert batch.paused_at_step == -1


def test_batch_work_lets_nobody_pause_for_its_start():
    bench = Bench(slots=Slots(size=1), num_blocks=999)
    bench.add(adapter="a", n=200)
    bench.step()
    late = bench.add(adapter="b", n=1, priority="batch")
    for _ in range(150):
        bench.step()
    assert late.status is Status.PARKED


def test_without_a_seat_or_blocks_for_the_new_one_nobody_pauses():
    for bench in (Bench(slots=Slots(size=1), seqs=1), Bench(slots=Slots(size=1), num_blocks=10)):
        bench.add(adapter="a", n=34)
        bench.step()
        bench.add(20, adapter="b", n=9)
        for _ in range(30):
            bench.step()
            assert running(bench) == {1}


def test_one_that_pauses_can_be_aborted_and_lose_its_blocks():
    bench = Bench(slots=Slots(size=1), num_blocks=16)
    first = bench.add(adapter="a", n=60)
    bench.step()
    bench.add(adapter="b", n=40)
    while first.paused_at_step < 0:
        bench.step()
    bench.scheduler.finish(first)
    bench.step()
    assert bench.scheduler.num_parked == 0
    bench.add(8, adapter="c", n=30)
    for _ in range(120):
        bench.step()
    assert bench.finished == [2, 3]


def test_room_is_made_for_one_that_goes_away_and_is_anybody_s_again():
    bench = Bench(slots=Slots(size=1))
    first = bench.add(adapter="a", n=60)
    bench.step()
    gone = bench.add(adapter="b", n=60)
    for _ in range(TURN_STEPS - 1):
        bench.step()
    bench.scheduler._turns.take(bench.scheduler.running, TURN_STEPS + 1)
    assert first.paused_at_step > 0
    bench.scheduler.finish(gone)
    bench.step()
    bench.step()
    assert running(bench) == {1}


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_each_gets_its_own_tokens_however_often_it_pauses(steps_ahead, monkeypatch):
    monkeypatch.setattr(adapter_turns, "TURN_S", 0)
    engine, _ = fake_engine(
        num_pages=(2, 2, 2, 2), steps_ahead=steps_ahead, num_blocks=400, max_num_seqs=16
    )
    names = [f"n{number}" for number in range(4)]
    for name in names:
        engine.register_adapter(name, f"/adapters/{name}-1-1-1-1")
    added = [
        (engine.add(request([1, index], n=60, **{names[index % 4]: 1.0})), index)
        for index in range(8)
    ]
    paused = set()
    first_tokens = []
    outputs = {number: [] for number, _ in added}
    while engine.has_work():
        engine.wait_for_adapters(5)
        for token in engine.step():
            outputs[token.request_id].append(token)
            if token.index == 0:
                first_tokens.append(engine.stats().steps)
        engine.check_integrity()
        paused |= {s.sequence_id for s in engine._scheduler.running if s.paused_at_step >= 0}
    for number, index in added:
        content = ((names[index % 4], 1.0),)
        assert ids(outputs[number]) == expected_tokens([1, index], content, 7, 60)
    assert len(paused) >= 4
    assert max(first_tokens) < 60, "no answer's end was waited for"
    engine.close()


def test_what_host_memory_does_not_keep_is_not_paused(monkeypatch):
    monkeypatch.setattr(adapter_turns, "TURN_S", 0)

    def most_paused(max_staged):
        engine, _ = fake_engine(num_pages=(2, 2, 2, 2), max_num_seqs=16)
        engine._adapters._max_staged = max_staged
        for number in range(4):
            engine.register_adapter(f"n{number}", f"/adapters/n{number}-1-1-1-1")
            engine.add(request([1], n=60, **{f"n{number}": 1.0}))
        most = 0
        while engine.has_work():
            while engine._adapters._supply._loads.num_loading:
                engine._take_loads(5)
            engine.step()
            most = max(most, sum(s.paused_at_step >= 0 for s in engine._scheduler.running))
        return most

    assert most_paused(4) > 0
    assert most_paused(1) == 0


def test_a_turn_s_length_follows_from_what_loads_took():
    engine, _ = fake_engine(num_pages=(2, 2, 2, 2))
    for number in range(5):
        engine.register_adapter(f"n{number}", f"/adapters/n{number}-1-1-1-1")
    drain_one(engine, request([1], n=1, n0=1.0))
    drain_one(engine, request([1], n=1, n1=1.0))
    manager = engine._adapters
    manager._resident.load_s = 0.25
    keys = [manager._by_name[f"n{number}"].key for number in range(5)]
    of_two = pytest.approx(TURN_SHARE * 2 * 0.25)
    assert manager.turn_s(keys[:2]) == of_two
    assert manager.turn_s(keys[:4]) == of_two, "of the other two nothing is known yet"
    assert manager.turn_s(keys) is None
    assert manager.turn_s(keys[2:]) is None


def test_an_engine_whose_only_sequence_pauses_for_its_adapter_waits_without_turning():
    engine, _ = fake_engine(num_pages=(1, 1, 1, 1))
    for name in ("rose", "fern"):
        engine.register_adapter(name, f"/adapters/{name}-1-1-1-1")
    first = engine.add(request([1], n=60, rose=1.0))
    second = engine.add(request([2], n=TURN_STEPS * 3, fern=1.0))
    outputs = drain(engine)
    assert ids(outputs[first]) == expected_tokens([1], (("rose", 1.0),), 7, 60)
    assert len(outputs[second]) == TURN_STEPS * 3


def test_a_burst_over_many_more_than_fit_runs_to_its_ends(monkeypatch):
    """As on a GPU: 3.6 adapters wanted for each that fits, and host memory for a few more."""
    engine, _ = fake_engine(num_pages=(8,) * 4, num_blocks=2000, max_num_seqs=32)
    engine._adapters._max_staged = 9
    schedule = engine._scheduler.schedule
    monkeypatch.setattr(
        engine._scheduler, "schedule", lambda step, tokens, _: schedule(step, tokens, 0.012)
    )
    drawn = random.Random(0).choices(range(120), [1 / (rank + 1) for rank in range(120)], k=64)
    for number in set(drawn):
        engine.register_adapter(f"n{number}", f"/adapters/n{number}-1-1-1-1")
    for index, number in enumerate(drawn):
        engine.add(request([1, index], n=100, **{f"n{number}": 1.0}))
    assert len(set(drawn)) > 3 * 8
    while engine.has_work():
        engine.wait_for_adapters(5)
        engine.step()
        assert not any(s.paused_at_step >= 0 for s in engine._scheduler.running)
    (device,) = engine.stats().tiers
    assert device.loads <= 1.2 * len(set(drawn))
    engine.close()
