"""Stops, and text that is shown only once it cannot begin a stop string."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.engine.stop_checker import StopChecker, token_stop
from openlora.sampling_params import SamplingParams


def run(texts, stop, **settings):
    """(shown texts, what finish gives, why it ended, tokens fed)."""
    checker = StopChecker(SamplingParams(stop=tuple(stop), **settings), {0})
    shown = []
    for text in texts:
        visible, reason = checker.feed(1, text)
        shown.append(visible)
        if reason:
            return shown, checker.finish(), reason, checker.num_tokens
    return shown, checker.finish(), None, checker.num_tokens


@pytest.mark.parametrize(
    ("texts", "stop", "shown", "rest", "reason"),
    [
        (["ab", "cd"], [], ["ab", "cd"], "", None),
        (["ab", "cd", "ef"], ["cd"], ["ab", ""], "", "stop"),
        (["a#", "#b"], ["##"], ["a", ""], "", "stop"),
        (["a#", "b#"], ["##"], ["a", "#b"], "#", None),
        (["xab", "abc"], ["ababc"], ["x", ""], "", "stop"),
        (["ab", "abx"], ["ababc"], ["", "ababx"], "", None),
        (["one two"], ["two", "ne"], ["o"], "", "stop"),
        (["aaa", "b"], ["aab"], ["a", ""], "", "stop"),
        (["", "", "x"], ["yx"], ["", "", "x"], "", None),
        (["x"], ["x"], [""], "", "stop"),
    ],
)
def test_stop_strings(texts, stop, shown, rest, reason):
    assert run(texts, stop)[:3] == (shown, rest, reason)


def test_eos_and_length_count_every_token():
    params = SamplingParams(max_tokens=3)
    assert token_stop(0, 1, params, {0}) == "stop"
    assert token_stop(0, 1, SamplingParams(ignore_eos=True), {0}) is None
    assert token_stop(5, 2, params, {0}) is None
    assert token_stop(5, 3, params, {0}) == "length"
    assert token_stop(0, 3, params, {0}) == "stop"


def test_what_is_held_at_the_end_is_shown_with_the_detokenizers_rest():
    checker = StopChecker(SamplingParams(stop=("abc",), max_tokens=2), {0})
    assert checker.feed(1, "xa") == ("x", None)
    assert checker.feed(2, "") == ("", "length")
    assert checker.finish("\ufffd") == "a\ufffd"
    assert checker.finish() == ""


def test_a_stop_string_that_the_last_text_completes_is_not_shown():
    checker = StopChecker(SamplingParams(stop=("ab",)), {0})
    checker.feed(1, "xa")
    assert checker.finish("b!") == ""


@given(
    text=st.text("abc", max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_shown_text_is_the_output_up_to_the_first_stop_string(text, cuts, stop):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, rest, reason, num_fed = run(pieces, stop)
    seen = "".join(pieces[:num_fed])
    if reason is None:
        assert "".join(shown) + rest == text
        assert not any(s in text for s in stop)
    else:
        first = min(at for s in stop if (at := seen.find(s)) >= 0)
        assert "".join(shown) == text[:first]
        assert rest == ""
        assert not any(s in "".join(pieces[: num_fed - 1]) for s in stop)
