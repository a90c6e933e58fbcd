"""Whose turn it is among those that wait."""

from __future__ import annotations

from openlora.engine import fair_queue
from openlora.engine.fair_line import IN_A_ROW
from openlora.engine.fair_queue import FairQueue
from tests.engine.scheduler_bench import Bench, Slots
from tests.engine.sequences import make_sequence


def sequences(first, count, tenant="", adapter=None):
    made = [
        make_sequence(first + n, [1], adapters=((adapter, 1.0),) if adapter else ())
        for n in range(count)
    ]
    for sequence in made:
        sequence.tenant = tenant
    return made


def queue_of(*sequences):
    queue = FairQueue(by_adapter=True)
    for sequence in sequences:
        queue.add(sequence)
    return queue


def serve(queue, running=()):
    sequence = queue.first(running)
    queue.remove(sequence)
    queue.serve(sequence)
    return sequence


def test_the_tenant_with_the_fewest_seats_comes_first_and_the_oldest_of_those_that_are_level():
    a, b, c = (sequences(first, 2, tenant) for first, tenant in ((5, "a"), (3, "b"), (1, "c")))
    queue = queue_of(*a, *b, *c)
    assert queue.first(sequences(10, 1, "c")) is b[0]
    assert queue.first([*sequences(10, 1, "c"), *sequences(20, 1, "b")]) is a[0]
    assert queue.first(sequences(10, 40, "elsewhere")) is c[0]


def test_tenants_share_the_seats_whatever_they_ask_for():
    queue = queue_of(*sequences(0, 500, "greedy"), *sequences(1000, 5, "modest"))
    running = sequences(2000, 8, "greedy")
    for _ in range(5):
        running.append(serve(queue, running))
    assert [s.tenant for s in running[8:]] == ["modest"] * 5
    assert serve(queue, running).tenant == "greedy"


def test_a_flood_of_one_adapter_keeps_another_of_the_same_tenant_waiting_for_one_row_at_most():
    queue = queue_of(*sequences(0, 500, adapter="flood"))
    for _ in range(100):
        serve(queue)
    (quiet,) = sequences(1000, 1, adapter="quiet")
    queue.add(quiet)
    assert quiet in [serve(queue) for _ in range(IN_A_ROW)]


def test_one_that_comes_back_has_its_old_place():
    flood = sequences(0, 100)
    queue = queue_of(*flood)
    preempted = serve(queue)
    assert preempted is flood[0]
    queue.add(preempted)
    assert queue.first() is preempted


def test_a_tenant_whose_line_was_empty_goes_on_by_its_clock():
    queue = queue_of(*sequences(0, 70, adapter="a"))
    for _ in range(70):
        serve(queue)
    queue.add(*sequences(100, 1, adapter="a"))
    (newer,) = sequences(200, 1, adapter="b")
    queue.add(newer)
    assert [s.sequence_id for s in queue] == [100, 200]


def test_the_count_and_all_that_wait_are_known():
    flood, other = sequences(0, 70), sequences(100, 1, "other")
    queue = queue_of(*flood, *other)
    assert (len(queue), list(queue)) == (71, flood + other)
    for sequence in [*flood, *other]:
        queue.remove(sequence)
    assert (len(queue), queue.first()) == (0, None)


def test_tenants_that_want_nothing_are_forgotten(monkeypatch):
    monkeypatch.setattr(fair_queue, "_REMEMBERED", 10)
    queue = FairQueue(by_adapter=True)
    for number in range(50):
        (sequence,) = sequences(number, 1, f"tenant {number}")
        queue.add(sequence)
        assert serve(queue) is sequence
    assert (len(queue._lines), len(queue._empty)) == (0, 10)


def starts_until(bench, sequence):
    """How many others begin before it does."""
    begun = set()
    while not sequence.num_computed_tokens:
        begun |= {row for row, _ in bench.step()}
    return len(begun - {sequence.sequence_id})


def test_a_scheduler_gives_a_tenant_the_next_seat_in_another_s_flood():
    bench = Bench(seqs=4, num_blocks=999)
    for _ in range(300):
        bench.add(2, n=3, tenant="greedy")
    bench.step()
    modest = bench.add(2, n=3, tenant="modest")
    assert starts_until(bench, modest) <= 8


def test_a_scheduler_starts_a_quiet_adapter_behind_one_row_of_a_flood():
    bench = Bench(seqs=4, num_blocks=999, slots=Slots(size=2))
    for _ in range(300):
        bench.add(2, n=2, adapter="flood")
    bench.step()
    quiet = bench.add(2, n=2, adapter="quiet")
    assert starts_until(bench, quiet) <= IN_A_ROW + 4
    bench.run()
    assert len(bench.finished) == 301


def test_what_has_no_room_is_not_overtaken_for_ever():
    """A tenant with short requests always has the fewer seats; another's needs all blocks."""
    bench = Bench(seqs=4, num_blocks=16, budget=64)
    bench.add(4, n=30, tenant="large")
    large = bench.add(50, n=2, tenant="large")
    for _ in range(400):
        bench.add(4, n=2, tenant="short")
        bench.step()
        if large.num_computed_tokens:
            return
    raise AssertionError("the large one never started")
