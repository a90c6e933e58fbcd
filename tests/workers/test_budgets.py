"""Batch pauses first, and room never lets one fetch go far over a budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from workers.budgets import Budgets

HELD = st.integers(0, 2000)
BUDGETS = st.builds(Budgets, interactive=st.integers(1, 600), batch=st.integers(1, 600))


def test_what_pauses_when():
    budgets = Budgets(interactive=8, batch=4)
    assert budgets.paused_topics(0, 0) == set()
    assert budgets.paused_topics(0, 4) == {BATCH_TOPIC}
    assert budgets.paused_topics(4, 0) == {BATCH_TOPIC}
    assert budgets.paused_topics(8, 0) == {BATCH_TOPIC, JOBS_TOPIC}


@given(BUDGETS, HELD, HELD)
def test_interactive_never_pauses_alone(budgets, interactive, batch):
    paused = budgets.paused_topics(interactive, batch)
    assert JOBS_TOPIC not in paused or BATCH_TOPIC in paused


@given(BUDGETS, HELD, HELD)
def test_a_fetch_fits_into_the_smallest_budget_that_is_not_paused(budgets, interactive, batch):
    room = budgets.room(interactive, batch)
    paused = budgets.paused_topics(interactive, batch)
    assert room >= 1
    if JOBS_TOPIC not in paused:
        assert interactive + room <= budgets.interactive
    if BATCH_TOPIC not in paused:
        assert batch + room <= budgets.batch
