"""Who runs: order, budget, fairness, and that nobody waits for ever."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from openlora.engine.scheduler import BATCH_PATIENCE_STEPS
from openlora.engine.sequence import Status
from openlora.engine.waiting import ROOM_PATIENCE_STEPS
from tests.engine.scheduler_bench import Bench, Slots


def test_decodes_come_first_then_chunks_then_new_ones_within_the_budget():
    bench = Bench(budget=10, seqs=4)
    bench.add(2, n=20)
    assert bench.step() == [(1, 2)]
    bench.add(15)
    assert bench.step() == [(1, 1), (2, 9)]
    bench.add(3)
    assert bench.step() == [(1, 1), (2, 6), (3, 3)]
    assert bench.step() == [(1, 1), (2, 1), (3, 1)]


def test_interactive_comes_before_batch_in_every_phase():
    bench = Bench(budget=8, seqs=4)
    bench.add(16, priority="batch")
    assert bench.step() == [(1, 8)]
    bench.add(12)
    bench.add(4, priority="batch")
    assert bench.step() == [(2, 8)], "the batch sits one step out"
    assert bench.step() == [(2, 4), (1, 4)], "and goes on in the next"
    bench = Bench(budget=8, seqs=1)
    bench.add(4, priority="batch")
    bench.add(4)
    assert bench.step() == [(2, 4)]


def test_batch_prompts_have_a_smaller_budget_and_go_on_in_chunks():
    bench = Bench(budget=32, seqs=8)
    bench.add(2, n=40)
    bench.step()
    bench.batch_tokens = 6
    bench.add(10, priority="batch")
    bench.add(5, priority="batch")
    assert bench.step() == [(1, 1), (2, 6)]
    bench.add(20)
    assert bench.step() == [(1, 1), (4, 20)], "which is no limit of interactive ones"
    assert bench.step() == [(1, 1), (4, 1), (2, 4), (3, 2)]
    bench.batch_tokens = 0
    assert bench.step() == [(1, 1), (4, 1), (2, 1)], "and none of decodes"


def test_batch_decodes_sit_out_a_step_for_an_interactive_prompt_and_never_two():
    bench = Bench(budget=16, seqs=8)
    for _ in range(3):
        bench.add(2, priority="batch", n=40)
    bench.step()
    assert bench.step() == [(1, 1), (2, 1), (3, 1)]
    bench.add(4, n=3)
    assert bench.step() == [(4, 4)]
    assert bench.step() == [(4, 1), (1, 1), (2, 1), (3, 1)]
    bench.add(20, n=1)
    assert bench.step() == [(4, 1), (5, 15)]
    assert bench.step() == [(1, 1), (2, 1), (3, 1), (5, 5)]


def test_an_interactive_one_that_cannot_start_keeps_no_batch_waiting():
    bench = Bench(slots=Slots(cold={"cold"}))
    bench.add(2, priority="batch", n=9)
    bench.step()
    bench.add(2, adapter="cold")
    assert bench.step() == [(1, 1)]


def test_batch_gives_up_its_seat_and_its_blocks():
    bench = Bench(seqs=2)
    bench.add(2, priority="batch", n=9)
    bench.add(2, priority="batch", n=9)
    bench.step()
    bench.add(3, n=1)
    assert bench.step() == [(3, 3)]
    bench.run()
    bench = Bench(num_blocks=6, seqs=8)
    bench.add(12, priority="batch", n=4)
    bench.step()
    bench.add(12, n=1)
    assert bench.step() == [(2, 12)]
    bench.run()
    assert sorted(bench.finished) == [1, 2]


def test_batch_is_passed_over_a_bounded_number_of_times():
    bench = Bench(budget=8, seqs=4, num_blocks=999)
    batch = bench.add(4, priority="batch", n=1)
    for _ in range(BATCH_PATIENCE_STEPS):
        bench.add(8, n=1)
        bench.step()
        assert batch.status is Status.WAITING
    bench.add(8, n=1)
    rows = bench.step()
    assert rows[0] == (batch.sequence_id, 4)
    assert batch.status is Status.FINISHED


def test_a_long_batch_prefill_advances_under_a_flood_of_interactive_work():
    bench = Bench(budget=8, seqs=4, num_blocks=999)
    batch = bench.add(40, priority="batch", n=1)
    for _ in range(6 * (BATCH_PATIENCE_STEPS + 1)):
        bench.add(8, n=1)
        bench.step()
    assert batch.status is Status.FINISHED


def test_the_youngest_of_the_lowest_priority_loses_its_blocks():
    bench = Bench(num_blocks=6, seqs=4)
    old = bench.add(4, n=12)
    batch = bench.add(4, n=12, priority="batch")
    young = bench.add(4, n=12)
    preempted = []
    for _ in range(12):
        bench.step()
        for sequence in (old, batch, young):
            if sequence.num_preemptions and sequence not in preempted:
                preempted.append(sequence)
    assert preempted[0] is batch
    assert old not in preempted
    bench.run()
    assert sorted(bench.finished) == [1, 2, 3]


def test_a_batch_sequence_preempted_often_counts_as_interactive():
    bench = Bench(num_blocks=4, seqs=4)
    batch = bench.add(4, n=8, priority="batch")
    for _ in range(200):
        if batch.status is Status.FINISHED:
            break
        bench.step()
        if bench.scheduler.num_waiting < 2:
            bench.add(4, n=8)
    assert batch.status is Status.FINISHED


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones():
    bench = Bench(num_blocks=8, seqs=8)
    for _ in range(3):
        bench.add(4, n=4)
    large = bench.add(24, n=1)
    for _ in range(60):
        bench.add(4, n=4)
        bench.step()
    assert large.status is Status.FINISHED


def test_a_cold_adapter_holds_up_nobody():
    bench = Bench(slots=Slots(cold={"cold"}))
    waiting = bench.add(adapter="cold")
    bench.add(adapter="warm")
    bench.add()
    assert [number for number, _ in bench.step()] == [2, 3]
    assert waiting.status is Status.PARKED
    assert bench.scheduler.num_parked == 1
    bench.slots.cold.clear()
    assert bench.scheduler.unpark_loaded("warm") == []
    assert bench.scheduler.unpark_loaded("cold") == [waiting]
    bench.run()
    assert sorted(bench.finished) == [1, 2, 3]


def test_a_sequence_without_room_waits_until_room_comes_and_holds_up_nobody():
    bench = Bench(slots=Slots(size=1))
    bench.add(adapter="rose", n=6)
    waiting = bench.add(adapter="fern")
    bench.add(adapter="rose")
    bench.add()
    assert [number for number, _ in bench.step()] == [1, 3, 4]
    assert waiting.status is Status.PARKED
    for _ in range(7):
        bench.step()
    assert waiting.status is Status.RUNNING


def test_a_rare_adapter_gets_room_beside_one_that_is_always_in_use():
    bench = Bench(slots=Slots(size=1), num_blocks=999)
    bench.add(adapter="popular", n=5)
    bench.step()
    rare = bench.add(adapter="rare", n=1, priority="batch")
    for _ in range(ROOM_PATIENCE_STEPS + 20):
        if bench.step_number % 3 == 0:
            bench.add(adapter="popular", n=5)
        bench.step()
    assert rare.status is Status.FINISHED
    for _ in range(40):
        bench.step()
    assert not bench.scheduler.num_parked


def test_aborting_the_one_that_holds_others_back_lets_them_go():
    bench = Bench(slots=Slots(size=1), num_blocks=999)
    bench.add(adapter="popular", n=ROOM_PATIENCE_STEPS + 20)
    bench.step()
    rare = bench.add(adapter="rare", priority="batch")
    for _ in range(ROOM_PATIENCE_STEPS + 5):
        bench.step()
    held = bench.add(adapter="popular", n=1)
    bench.step()
    assert held.status is Status.PARKED
    bench.scheduler.finish(rare)
    bench.step()
    assert held.status is Status.FINISHED


def test_a_sequence_with_an_unread_token_does_not_start_again_before_it_is_read():
    bench = Bench(num_blocks=3, seqs=2)
    sequence = bench.add(4)
    sequence.num_pending_tokens = 1
    assert bench.step() == []
    sequence.num_pending_tokens = 0
    assert bench.step() == [(1, 4)]


arrivals = st.lists(
    st.tuples(
        st.integers(1, 20),
        st.integers(1, 40),
        st.sampled_from(["interactive", "batch"]),
        st.sampled_from([None, None, "a", "b", "c"]),
        st.integers(0, 10),
    ),
    max_size=14,
)


@given(jobs=arrivals, num_blocks=st.integers(16, 24), seqs=st.integers(1, 5), caching=st.booleans())
@settings(max_examples=100, deadline=None)
def test_everything_ends_and_the_same_input_gives_the_same_schedule(
    jobs, num_blocks, seqs, caching
):
    def run() -> list[list[tuple[int, int]]]:
        bench = Bench(num_blocks, seqs=seqs, budget=8, caching=caching)
        rows = []
        for step in range(11):
            for length, n, priority, adapter, at in jobs:
                if at == step:
                    bench.add(length, n=n, priority=priority, adapter=adapter)
            rows.append(bench.step())
        for _ in range(2000):
            rows.append(bench.step())
            if len(bench.finished) == len(jobs):
                break
        assert sorted(bench.finished) == list(range(1, len(jobs) + 1))
        assert bench.blocks.num_free_blocks == num_blocks
        return rows

    assert run() == run()
