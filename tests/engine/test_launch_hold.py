"""When the next step is launched while one runs: late, where somebody may ask at any moment."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from openlora.engine.batch_pace import ABOUT_S, CERTAIN, BatchPace
from openlora.engine.launch_hold import FIRST_MARGIN_S, LEAST_MARGIN_S, MOST_S, LaunchHold
from openlora.engine.step_budget import LaunchedStep, ScheduledRow
from tests.engine.sequences import make_sequence

LINE = make_sequence(1, [0], priority="batch")
STEP_S = 0.010
DECODES = [ScheduledRow(LINE, 5, 1, samples=True)] * 64


@dataclass
class Pending:
    done: bool = False

    def is_done(self) -> bool:
        return self.done


def launched(rows, at, *, number=1, done=False):
    return LaunchedStep(number, rows, Pending(done), at)


@pytest.fixture
def pace():
    """Knows that a step of 64 lines takes 10 ms; somebody asked at 1000.0. Its last ended then."""
    found = BatchPace()
    asked = ScheduledRow(make_sequence(2, [0], priority="interactive"), 0, 1, samples=True)
    found.take([asked], 999.0, 999.9)
    found.take(DECODES, 1000.0 - STEP_S, 1000.0)
    return found


def test_the_launch_waits_until_shortly_before_the_step_in_flight_is_done(pace):
    hold = LaunchHold(pace)
    hold.launched(0.001, None)
    # It was launched while the one before it ran, which was done at 1000.0.
    [step] = [launched(DECODES, 999.995)]
    wait_s = hold.wait_s([step], False, 1000.0)
    assert wait_s == pytest.approx(STEP_S - 0.001 - FIRST_MARGIN_S)
    assert hold.wait_s([step], False, 1000.0 + wait_s) == pytest.approx(0, abs=1e-6)
    assert hold.wait_s([step], False, 1001.0) == 0


def test_prompts_make_a_step_longer_once_it_is_known_by_how_much(pace):
    hold = LaunchHold(pace)
    with_prompt = [*DECODES, ScheduledRow(LINE, 0, 20, samples=True)]
    plain_s, early_s = (
        hold.wait_s([launched(rows, 1000.0)], False, 1000.0) for rows in (DECODES, with_prompt)
    )
    assert plain_s == early_s > 0
    pace.take([*DECODES, ScheduledRow(LINE, 0, 40, samples=True)], 1000.0, 1000.0 + STEP_S + 0.004)
    at = 1000.0 + STEP_S + 0.004
    later_s = hold.wait_s([launched(with_prompt, at)], False, at)
    assert later_s == pytest.approx(plain_s + CERTAIN * 0.002)


def test_a_launch_that_came_too_late_is_followed_by_earlier_ones(pace):
    hold = LaunchHold(pace)
    waits = []
    for number, done in enumerate([False, True, True, False], start=1):
        step = launched(DECODES, 1000.0, number=number, done=done)
        waits.append(hold.wait_s([step], False, 1000.0))
        hold.launched(0, step)
    first, second, third, fourth = waits
    assert second - first == pytest.approx(0.02 * FIRST_MARGIN_S)
    assert third == pytest.approx(STEP_S - 2 * (STEP_S - second))
    assert fourth == pytest.approx(STEP_S - 4 * (STEP_S - second))
    for number in range(10, 400):
        step = launched(DECODES, 1000.0, number=number)
        hold.wait_s([step], False, 1000.0)
        hold.launched(0, step)
    assert hold.margin_s == LEAST_MARGIN_S


def test_nothing_is_learnt_of_launches_that_did_not_wait(pace):
    hold = LaunchHold(pace)
    step = launched(DECODES, 1000.0, done=True)
    assert hold.wait_s([step], True, 1000.0) == 0
    hold.launched(0, step)
    hold.launched(0, None)
    assert hold.margin_s == FIRST_MARGIN_S


def test_launches_wait_again_behind_several_that_came_too_late(pace):
    """With a margin longer than a step none would wait, and none show that it could be shorter."""
    hold = LaunchHold(pace)
    late = 0
    while hold.wait_s([launched(DECODES, 1000.0, number=late)], False, 1000.0) > 0:
        hold.launched(0, launched(DECODES, 1000.0, number=late, done=True))
        late += 1
        assert late < 9
    for number in range(late, late + 60):
        hold.launched(0, launched(DECODES, 1000.0, number=number, done=True))
    assert hold.wait_s([launched(DECODES, 1000.0)], False, 1000.0) > 0
    assert hold.margin_s > FIRST_MARGIN_S


def test_a_host_that_is_slow_to_launch_waits_for_less(pace):
    hold = LaunchHold(pace)
    step = launched(DECODES, 1000.0)
    hold.launched(0.008, None)
    assert hold.wait_s([step], False, 1000.0) == pytest.approx(0.001)
    for _ in range(50):
        hold.launched(0.001, None)
    assert hold.wait_s([step], False, 1000.0) > 0.006


@pytest.mark.parametrize(
    ("rows", "count", "has_interactive", "now_s"),
    [
        (DECODES, 1, True, 1000.0),  # somebody waits for it
        (DECODES, 0, False, 1000.0),  # the device has nothing to do
        ([ScheduledRow(LINE, 0, 20, samples=True)], 1, False, 1000.0),  # it may be short
        (DECODES, 1, False, 1000.0 + ABOUT_S + 1),  # nobody has asked for long
    ],
)
def test_else_the_next_step_is_launched_at_once(pace, rows, count, has_interactive, now_s):
    assert LaunchHold(pace).wait_s([launched(rows, now_s)] * count, has_interactive, now_s) == 0


def test_a_step_that_was_slow_by_chance_holds_up_nothing(pace):
    pace.take(DECODES, 1000.0, 1003.0)
    wait_s = LaunchHold(pace).wait_s([launched(DECODES, 1003.0)], False, 1003.0)
    assert wait_s == pytest.approx(STEP_S - FIRST_MARGIN_S)


def test_what_is_known_of_other_batches_is_taken_for_the_least():
    def wait_s(known_rows, known_s, rows):
        pace = BatchPace()
        asked = ScheduledRow(make_sequence(2, [0], priority="interactive"), 0, 1, samples=True)
        pace.take([asked] * known_rows, 1000.0 - known_s, 1000.0)
        step = launched([ScheduledRow(LINE, 5, 1, samples=True)] * rows, 1000.0)
        return LaunchHold(pace).wait_s([step], False, 1000.0)

    assert wait_s(8, 0.005, 64) == pytest.approx(0.005 - FIRST_MARGIN_S)  # not eight times as long
    assert wait_s(64, 0.010, 24) == pytest.approx(0.005 - FIRST_MARGIN_S)
    assert wait_s(64, 5.0, 64) == MOST_S
