"""Batch waits first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from openlora.protocol.names import BATCH_TOPIC, JOBS_TOPIC
from workers.budgets import Budgets

HELD = st.integers(0, 2000)
BUDGETS = st.builds(Budgets, interactive=st.integers(1, 600), batch=st.integers(1, 600))


def test_what_pauses_when():
    budgets = Budgets(interactive=8, batch=4)
    assert budgets.full_topics(0, 0) == set()
    assert budgets.full_topics(0, 4) == {BATCH_TOPIC}
    assert budgets.full_topics(4, 0) == {BATCH_TOPIC}
    assert budgets.full_topics(8, 0) == {BATCH_TOPIC, JOBS_TOPIC}


@given(BUDGETS, HELD, HELD)
def test_interactive_never_pauses_alone(budgets, interactive, batch):
    full = budgets.full_topics(interactive, batch)
    assert JOBS_TOPIC not in full or BATCH_TOPIC in full
