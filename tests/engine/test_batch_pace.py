"""The pace at which a batch's prompts are computed: learnt from an engine of known speed."""

import pytest

from openlora.engine.batch_pace import (
    ABOUT_S,
    FIRST_TOKENS,
    LEAST_TOKENS,
    LONGER_S,
    MOST_TOKENS,
    PROBE_EVERY,
    SHARE,
    BatchPace,
)
from openlora.engine.step_budget import ScheduledRow
from tests.engine.sequences import make_sequence

BATCH = make_sequence(1, [0], priority="batch")
INTERACTIVE = make_sequence(2, [0], priority="interactive")


def step(pace, now, seconds, *, decodes, tokens, interactive=False):
    """A step that took so long; → the time after it."""
    rows = [ScheduledRow(BATCH, 0, 1, samples=True)] * decodes
    if tokens:
        rows.append(ScheduledRow(BATCH, 0, tokens, samples=True))
    if interactive:
        rows.append(ScheduledRow(INTERACTIVE, 0, 1, samples=True))
    pace.take(rows, now, now + seconds)
    return now + seconds


def drive(pace, *, plain_s, row_s, tokens_per_s, steps=200, interactive=False, seats=64):
    """An engine with lines enough; → the most tokens of its last steps, and their seconds."""
    now, rows, taken = 1000.0, 0, []
    for _ in range(steps):
        tokens = pace.tokens
        seconds = plain_s + rows * row_s + tokens / tokens_per_s
        now = step(pace, now, seconds, decodes=rows, tokens=tokens, interactive=interactive)
        rows = min(seats, rows + tokens // 20)
        taken.append((tokens, seconds))
    return max(taken[-2 * PROBE_EVERY :])


@pytest.mark.parametrize(
    ("plain_s", "row_s", "tokens_per_s"), [(0.010, 0.0017, 700), (0.008, 0.0, 40_000)]
)
def test_beside_interactive_work_a_step_takes_less_than_two_plain_ones(
    plain_s, row_s, tokens_per_s
):
    pace = BatchPace()
    tokens, seconds = drive(
        pace, plain_s=plain_s, row_s=row_s, tokens_per_s=tokens_per_s, interactive=True
    )
    plain_s += 64 * row_s
    assert tokens / tokens_per_s > 0.5 * SHARE * plain_s
    assert seconds < 2 * plain_s


def test_without_it_prompts_may_take_a_tenth_of_a_second_and_more_where_steps_are_slow():
    tokens, _ = drive(BatchPace(), plain_s=0.008, row_s=0.0, tokens_per_s=10_000)
    assert tokens == pytest.approx(LONGER_S * 10_000, rel=0.2)
    tokens, _ = drive(BatchPace(), plain_s=0.4, row_s=0.0, tokens_per_s=1000)
    assert tokens == pytest.approx(SHARE * 400, rel=0.2)


def test_interactive_work_counts_as_about_for_a_while():
    pace = BatchPace()
    drive(pace, plain_s=0.01, row_s=0.0, tokens_per_s=10_000)
    now = step(pace, 5000.0, 0.01, decodes=4, tokens=0, interactive=True)
    now = step(pace, now, 0.02, decodes=4, tokens=100)
    assert pace._limit < 200
    step(pace, now + ABOUT_S, 0.02, decodes=4, tokens=100)
    assert pace._limit > 500


def test_a_fast_engine_is_not_held_back_and_a_slow_one_still_goes_on():
    assert drive(BatchPace(), plain_s=0.008, row_s=0.0, tokens_per_s=90_000)[0] == MOST_TOKENS
    slow = drive(BatchPace(), plain_s=1.0, row_s=0.0, tokens_per_s=10, interactive=True)
    assert slow[0] == LEAST_TOKENS


def test_one_step_of_some_takes_no_prompt_but_where_prompts_alone_are_there():
    pace = BatchPace()
    assert pace.tokens == FIRST_TOKENS
    now = 0.0
    for _ in range(2 * PROBE_EVERY):
        now = step(pace, now, 0.01, decodes=0, tokens=8)
        assert pace.tokens
    seen = []
    for _ in range(2 * PROBE_EVERY):
        now = step(pace, now, 0.01, decodes=2, tokens=8)
        seen.append(pace.tokens)
    assert seen.count(0) == 2


def test_a_pause_between_steps_is_no_part_of_them():
    pace = BatchPace()
    now = step(pace, 10.0, 0.1, decodes=4, tokens=0)
    before = pace._limit
    step(pace, now + 500, 0.2, decodes=4, tokens=before)
    assert pace._limit >= LEAST_TOKENS
    assert pace._tokens_per_s == pytest.approx(before / 0.1, rel=0.01)


def test_one_late_step_changes_little():
    pace = BatchPace()
    drive(pace, plain_s=0.1, row_s=0.0, tokens_per_s=1000)
    before = pace._limit
    step(pace, 9000.0, 0.1, decodes=64, tokens=0)
    step(pace, 9000.2, 0.1 + 0.075 + 0.05, decodes=64, tokens=75)
    assert before * 0.8 < pace._limit <= before * 1.2
