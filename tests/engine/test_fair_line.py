"""The line: first come, first served, and a bounded wait behind anybody's flood."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from openlora.engine import fair_line
from openlora.engine.fair_line import IN_A_ROW, FairLine


class Line:
    """A line whose things are (owner, age)."""

    def __init__(self):
        self.line = FairLine()
        self.ages = itertools.count()

    def come(self, owner, count=1):
        for _ in range(count):
            age = next(self.ages)
            place = self.line.place(owner, age)
            self.line.add(place, (owner, age, place))

    def serve(self):
        owner, age, place = self.line.first()
        self.line.remove(place)
        self.line.serve(place)
        return owner, age

    def serve_until(self, owner):
        return next(n for n in itertools.count() if self.serve()[0] == owner)


def test_one_owner_is_served_in_the_order_of_arrival():
    line = Line()
    line.come("a", 5 * IN_A_ROW)
    assert [line.serve()[1] for _ in range(5 * IN_A_ROW)] == list(range(5 * IN_A_ROW))
    assert len(line.line) == 0


@given(st.lists(st.sampled_from("abcdef"), max_size=IN_A_ROW))
def test_a_mixed_load_is_served_in_the_order_of_arrival(owners):
    line = Line()
    for owner in owners:
        line.come(owner)
    assert [line.serve()[1] for _ in owners] == list(range(len(owners)))


def test_a_flood_keeps_another_waiting_for_one_row_at_most():
    line = Line()
    line.come("flood", 1000)
    for _ in range(300):
        line.serve()
        line.come("flood")
    line.come("quiet")
    assert line.serve_until("quiet") < IN_A_ROW


def test_neither_of_two_floods_starves_the_other():
    """Whoever comes later does not overtake for ever either."""
    line = Line()
    line.come("a", 1000)
    for _ in range(700):
        line.come("b", 2)
        line.serve()
    served = [line.serve()[0] for _ in range(10 * IN_A_ROW)]
    assert abs(served.count("a") - served.count("b")) <= 2 * IN_A_ROW


def test_many_that_come_one_by_one_do_not_keep_the_rest_of_a_flood_waiting_for_ever():
    line = Line()
    line.come("flood", 3 * IN_A_ROW)
    for number in range(100 * IN_A_ROW):
        line.come(number % 50)
        if line.serve() == ("flood", 3 * IN_A_ROW - 1):
            return
    raise AssertionError("the last of the flood was never served")


def test_nor_do_many_that_come_once():
    line = Line()
    line.come("flood", 2 * IN_A_ROW)
    for number in range(20 * IN_A_ROW):
        line.come(number)
        if line.serve() == ("flood", 2 * IN_A_ROW - 1):
            return
    raise AssertionError("the last of the flood was never served")


def test_a_place_is_kept_by_what_was_away():
    line = FairLine()
    first, second = line.place("a", 1), line.place("a", 2)
    line.add(second, "second")
    line.add(first, "first")
    assert line.all() == ["first", "second"]
    line.remove(first)
    assert line.first() == "second"
    line.add(first, "first")
    assert line.first() == "first"


def test_owners_that_were_served_are_forgotten(monkeypatch):
    monkeypatch.setattr(fair_line, "_REMEMBERED", 10)
    line = Line()
    line.come("flood", 100)
    for number in range(1000):
        line.come(number)
        line.serve()
    assert len(line.line._last) <= 10 + 1 + len(line.line)
