"""When the consumer looks again: rarely, at once behind a hint, and often where none are heard."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from workers import attention
from workers.attention import (
    DEAF_AFTER_S,
    DEAF_PAUSE_S,
    FLOW_PAUSE_S,
    HOLDS_S,
    QUIET_AFTER_S,
    QUIET_PAUSE_S,
    Attention,
)


class Clock:
    """Time that passes while somebody waits, and otherwise by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def event(self) -> ClockedEvent:
        return ClockedEvent(self)


class ClockedEvent:
    """As ``threading.Event``; a wait that nobody ends takes its whole time on the clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout_s: float) -> bool:
        if not self._is_set:
            self._clock.now += timeout_s
        return self._is_set


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(attention, "time", clock)
    monkeypatch.setattr(attention, "threading", SimpleNamespace(Event=clock.event))
    return clock


@pytest.fixture
def rested(clock):
    """How long a rest took, in seconds."""

    def rest(of, **flows):
        began = clock.now
        of.rest(**{"batch_flows": False, **flows})
        return pytest.approx(clock.now - began)

    return rest


def test_the_first_look_is_a_quiet_one():
    assert Attention().is_quiet


def test_a_job_makes_it_look_often_for_longer_where_hints_are_not_heard(clock):
    looking = Attention()
    looking.took_job()
    clock.now += QUIET_AFTER_S + 0.1
    assert not looking.is_quiet
    looking.hears_hints(True)
    assert looking.is_quiet
    looking.hears_hints(False)
    clock.now += DEAF_AFTER_S
    assert looking.is_quiet


def test_pauses_are_longest_where_hints_are_heard(rested):
    looking = Attention()
    assert rested(looking) == DEAF_PAUSE_S
    looking.hears_hints(True)
    assert rested(looking) == QUIET_PAUSE_S
    assert rested(looking, batch_flows=True) == FLOW_PAUSE_S
    assert DEAF_PAUSE_S < QUIET_PAUSE_S


def test_a_hint_ends_a_rest_and_holds_for_a_while(clock, rested):
    looking = Attention()
    looking.hears_hints(True)
    looking.hint()
    assert rested(looking) == 0
    clock.now += HOLDS_S / 2
    assert rested(looking) == 0
    clock.now += HOLDS_S
    assert rested(looking) == 0  # the hint itself, if nobody rested since
    assert rested(looking) == QUIET_PAUSE_S


def test_whoever_needs_the_thread_wakes_it(rested):
    looking = Attention()
    looking.hears_hints(True)
    looking.wake()
    assert rested(looking) == 0
    assert rested(looking) == QUIET_PAUSE_S


def test_a_wake_that_ended_a_pause_leaves_out_the_rest_behind_it(rested):
    looking = Attention()
    looking.hears_hints(True)
    looking.wake()
    assert looking.pause(1.0)
    assert rested(looking) == 0
    assert rested(looking) == QUIET_PAUSE_S
    looking.wake()
    assert rested(looking) == 0
    assert not looking.pause(1.0)
    assert rested(looking) == QUIET_PAUSE_S


@pytest.mark.parametrize("wake", [Attention.hint, Attention.wake])
def test_a_rest_is_ended_by_another_thread(monkeypatch, wake):
    monkeypatch.setattr(attention, "QUIET_PAUSE_S", 60.0)
    looking = Attention()
    looking.hears_hints(True)
    threading.Timer(0.05, wake, (looking,)).start()
    began = time.monotonic()
    looking.rest(batch_flows=False)
    assert time.monotonic() - began < 30
