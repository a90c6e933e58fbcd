"""When the consumer looks again: rarely, at once behind a hint, and often where none are heard."""

from __future__ import annotations

import threading
import time

import pytest

from workers import attention
from workers.attention import Attention


@pytest.fixture
def rested():
    """How long a rest took, in seconds."""

    def rest(of, **flows):
        began = time.monotonic()
        of.rest(**{"batch_flows": False, **flows})
        return time.monotonic() - began

    return rest


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(attention, "QUIET_PAUSE_S", 0.4)
    monkeypatch.setattr(attention, "DEAF_PAUSE_S", 0.2)
    monkeypatch.setattr(attention, "FLOW_PAUSE_S", 0.05)
    monkeypatch.setattr(attention, "HOLDS_S", 0.1)


def test_the_first_look_is_a_quiet_one():
    assert Attention().is_quiet


def test_a_job_makes_it_look_often_for_longer_where_hints_are_not_heard(monkeypatch):
    monkeypatch.setattr(attention, "QUIET_AFTER_S", 0.05)
    looking = Attention()
    looking.took_job()
    time.sleep(0.1)
    assert not looking.is_quiet
    looking.hears_hints(True)
    assert looking.is_quiet


def test_pauses_are_longest_where_hints_are_heard(rested):
    looking = Attention()
    assert 0.2 <= rested(looking) < 0.35
    looking.hears_hints(True)
    assert rested(looking) >= 0.4
    assert rested(looking, batch_flows=True) < 0.2


def test_a_hint_ends_a_rest_and_holds_for_a_while(rested):
    looking = Attention()
    looking.hears_hints(True)
    threading.Timer(0.05, looking.hint).start()
    assert rested(looking) < 0.3
    assert rested(looking) < 0.05
    time.sleep(0.15)
    assert rested(looking) >= 0.4


def test_whoever_needs_the_thread_wakes_it(rested):
    looking = Attention()
    looking.hears_hints(True)
    looking.wake()
    assert rested(looking) < 0.1
    assert rested(looking) >= 0.4
