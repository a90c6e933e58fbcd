"""The pace at which prompts join: learnt from an engine of known speed."""

import pytest

from workers.bulk_pace import FIRST_TOKENS, LEAST_TOKENS, LONGER_S, MOST_TOKENS, Pace


def drive(pace, *, plain_s, tokens_per_s, steps, line=20):
    """An engine whose step takes ``plain_s`` and its prompts; → tokens joined a step."""
    now, computing, joined = 1.0, 0, 0
    taken = []
    for _ in range(steps):
        now += plain_s + computing / tokens_per_s
        pace.step(1, now)
        computing, joined = joined, 0
        while pace.room > 0:  # lines wait at all times
            pace.join(line)
            joined += line
        taken.append(joined)
    return max(taken[-16:])


@pytest.mark.parametrize(("plain_s", "tokens_per_s"), [(0.135, 800), (0.02, 3000)])
def test_what_joins_takes_about_a_tenth_of_a_second(plain_s, tokens_per_s):
    joined = drive(Pace(), plain_s=plain_s, tokens_per_s=tokens_per_s, steps=200)
    assert 0.6 * LONGER_S < joined / tokens_per_s < 1.8 * LONGER_S


def test_a_fast_engine_is_not_held_back_and_a_slow_one_still_goes_on():
    fast = drive(Pace(), plain_s=0.008, tokens_per_s=40_000, steps=100)
    assert fast >= MOST_TOKENS
    assert drive(Pace(), plain_s=1.0, tokens_per_s=10, steps=60) <= 2 * LEAST_TOKENS


def test_a_pause_teaches_nothing():
    pace = Pace()
    pace.step(1, 1.0)
    pace.step(1, 1.1)
    pace.join(FIRST_TOKENS)
    assert pace.room <= 0
    pace.rest()
    pace.step(1, 500.0)
    assert pace.room == FIRST_TOKENS


def test_steps_that_come_out_of_turn_let_no_flood_in():
    pace, now = Pace(), 1.0
    for number in range(400):
        # the prompts' time shows two steps after they joined, or one, or three
        now += 0.135 + (0.2 if number % 3 == 0 else 0.0)
        pace.step(1, now)
        joined = 0
        while pace.room > 0 and joined < 60:
            pace.join(20)
            joined += 20
        assert number < 50 or pace._limit < 4 * FIRST_TOKENS
