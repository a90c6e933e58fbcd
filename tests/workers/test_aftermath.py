"""Which ends of an engine are held against its jobs."""

from __future__ import annotations

import signal

import pytest

from workers.aftermath import how_it_died, is_crash


@pytest.mark.parametrize(
    "status",
    [None, 0, *(-s for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))],
)
def test_signals_from_outside_and_orderly_ends_are_nobodys_fault(status):
    assert not is_crash(status)


@pytest.mark.parametrize(
    ("status", "how"),
    [(1, "status 1"), (-signal.SIGSEGV, "SIGSEGV"), (-signal.SIGABRT, "SIGABRT")],
)
def test_crashes_are_somebodys(status, how):
    assert is_crash(status)
    assert how_it_died(status) == how
