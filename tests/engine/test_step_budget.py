"""What is left of a step, and how prompts of batches fill the size that it is rounded up to."""

from __future__ import annotations

import pytest

from openlora.engine.step_budget import StepBudget
from tests.engine.scheduler_bench import Bench

SIZES = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(
    ("num_tokens", "may", "takes"),
    [
        (8, 20, 8),  # 16 is full; 28 would cost as much as 32
        (8, 24, 24),
        (8, 8, 8),
        (8, 3, 8),  # any prompt makes a step of 16
        (5, 1, 3),
        (0, 5, 4),
        (8, 0, 0),  # none this time
        (8, 25, 25),  # beyond the last size nothing is rounded
        (32, 1, 1),
    ],
)
def test_prompts_fill_a_size(num_tokens, may, takes):
    budget = StepBudget(100 - num_tokens, may)
    budget.fill(num_tokens, SIZES)
    assert budget.batch_tokens == takes


def test_without_sizes_they_take_what_they_may():
    budget = StepBudget(100, 20)
    budget.fill(8, ())
    assert budget.batch_tokens == 20


def test_a_step_of_decodes_and_a_batchs_prompts_ends_at_a_size():
    bench = Bench(budget=64, seqs=8, step_sizes=SIZES)
    bench.add(2, n=40)
    bench.step()
    bench.batch_tokens = 10
    bench.add(30, priority="batch")
    assert bench.step() == [(1, 1), (2, 7)]
    bench.batch_tokens = 3
    assert bench.step() == [(1, 1), (2, 3)]
    bench.batch_tokens = None
    assert bench.step() == [(1, 1), (2, 20)]
