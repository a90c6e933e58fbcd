"""One stream: over any loss, repeat or restart the client sees each token once, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stream import TokenStream
from openlora.protocol.events import Chunk, End
from tests.gateway.chunks import JOB_ID, chunk, told


def test_chunks_in_order_are_passed_on_and_repeats_dropped() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    assert stream.feed(chunk(0, "ab"), frames)
    assert stream.feed(chunk(0, "ab"), frames)
    assert stream.feed(chunk(1, "bc"), frames)
    assert stream.feed(chunk(3, "d", end=True), frames)
    assert stream.feed(chunk(3, "d", end=True), frames)
    assert told(frames) == "abcd."
    assert stream.end is not None


def test_behind_a_gap_nothing_is_passed_on() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    assert stream.feed(chunk(0, "a"), frames)
    assert not stream.feed(chunk(2, "c"), frames)
    assert told(frames) == "a"


def test_a_new_claim_in_mid_stream_asks_for_the_log() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "ab"), frames)
    assert not stream.feed(chunk(2, "c", epoch=2), frames)
    log = (chunk(0, "ab"), chunk(2, "c", epoch=2))
    stream.meet_log(log[-1].epoch, log, frames)
    for logged in log:
        stream.feed_logged(logged, frames)
    assert stream.feed(chunk(3, "d", epoch=2), frames)
    assert told(frames) == "abcd"


def test_chunks_of_a_fenced_worker_are_dropped() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "a", epoch=2), frames)
    assert stream.feed(chunk(1, "z", epoch=1), frames)
    assert told(frames) == "a"


def test_a_restart_begins_at_index_0_and_is_said_once() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "abc"), frames)
    assert stream.feed(chunk(0, "x", epoch=5, new=True), frames)
    assert stream.feed(chunk(0, "x", epoch=5, new=True), frames)
    assert stream.feed(chunk(1, "y", epoch=5, end=True), frames)
    assert told(frames) == "abc<xy."


def test_a_restart_whose_first_chunk_was_missed_is_found_in_the_log() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "abc"), frames)
    assert not stream.feed(chunk(3, "z", epoch=5), frames)
    log = (chunk(0, "x", epoch=5, new=True), chunk(1, "yyz", epoch=5))
    stream.meet_log(log[-1].epoch, log, frames)
    for logged in log:
        stream.feed_logged(logged, frames)
    assert told(frames) == "abc<xyyz"


def test_a_log_lost_and_empty_restarts_a_resumed_stream_once() -> None:
    stream, frames = TokenStream("r", JOB_ID, 18), list[str]()
    stream.meet_log(0, (), frames)
    assert stream.feed(chunk(0, "x", epoch=3, new=True), frames)
    assert told(frames) == "<x"


def test_a_restart_before_the_first_token_needs_no_frame() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    assert stream.feed(chunk(0, "x", epoch=3, new=True), frames)
    assert told(frames) == "x"


def test_an_end_without_tokens_is_done() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    assert stream.feed(chunk(0, "", end=True), frames)
    assert told(frames) == "."


def test_a_log_without_its_last_moments_says_nothing_while_its_claim_is_lost() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "abcd", epoch=7), frames)
    log = (chunk(0, "ab", epoch=3),)
    stream.meet_log(3, log, frames)
    stream.feed_logged(log[0], frames)
    assert stream.feed(chunk(2, "cde", epoch=7), frames)
    assert told(frames) == "abcde"


@pytest.mark.parametrize("newest", [3, 7])
def test_what_an_older_claim_adds_behind_lost_moments_is_not_passed_on(newest: int) -> None:
    """``newest`` 7: the worker of that claim has just put it back, and will claim anew."""
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "abc", epoch=7), frames)
    log = (chunk(0, "a", epoch=3), chunk(1, "xyz", epoch=3))
    stream.meet_log(newest, log, frames)
    for logged in log:
        stream.feed_logged(logged, frames)
    assert stream.feed(chunk(4, "w", epoch=3), frames)
    assert told(frames) == "abc"
    log = (*log, chunk(4, "w", epoch=9))
    stream.meet_log(9, log, frames)
    for logged in log:
        stream.feed_logged(logged, frames)
    assert told(frames) == "abc<axyzw"


def test_what_another_claim_made_of_lost_moments_restarts_the_stream() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "abcd", epoch=7), frames)
    assert not stream.feed(chunk(2, "xyz", epoch=9), frames)
    log = (chunk(0, "ab", epoch=3), chunk(2, "xyz", epoch=9))
    stream.meet_log(9, log, frames)
    for logged in log:
        stream.feed_logged(logged, frames)
    assert stream.feed(chunk(4, "d", epoch=7), frames)
    assert told(frames) == "abcd<abxyz"


def test_a_resumed_stream_goes_by_the_claim_that_its_log_names() -> None:
    stream, frames = TokenStream("r", JOB_ID, 2), list[str]()
    log = (chunk(0, "ab", epoch=3),)
    stream.meet_log(3, log, frames)
    stream.feed_logged(log[0], frames)
    assert frames == []
    assert not stream.feed(chunk(1, "xy", epoch=9), frames)
    log = (chunk(0, "a", epoch=3), chunk(1, "xy", epoch=9))
    stream.meet_log(9, log, frames)
    for logged in log:
        stream.feed_logged(logged, frames)
    assert told(frames) == "<axy"


def test_an_end_of_an_older_claim_is_looked_up_and_taken() -> None:
    """The newer claim was lost, and its worker too."""
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "abcd", epoch=7), frames)
    assert stream.feed(chunk(2, "xy", epoch=3), frames)
    assert not stream.feed(chunk(4, "z", epoch=3, end=True), frames)
    log = (chunk(0, "ab", epoch=3), chunk(2, "xy", epoch=3), chunk(4, "z", epoch=3, end=True))
    stream.meet_log(3, log, frames)
    for logged in log:
        stream.feed_logged(logged, frames)
    assert told(frames) == "abcd<abxyz."


@pytest.mark.parametrize(
    ("log", "newest", "short"),
    [
        ((chunk(0, "abc", epoch=7),), 7, "c"),
        ((chunk(0, "ab", epoch=7), chunk(2, "c", epoch=9)), 9, "c"),
        ((chunk(0, "a", epoch=7), chunk(1, "xy", epoch=9)), 9, "<axy"),
        ((chunk(0, "a", epoch=7),), 9, "<a"),
        ((chunk(0, "xyz", epoch=3, end=True),), 3, "<xyz."),
        ((chunk(0, "a", epoch=7),), 7, ""),
        ((chunk(0, "xyz", epoch=3),), 3, ""),
    ],
    ids=[
        *("same claim", "claimed since", "other text", "shorter", "older end"),
        *("to be logged again", "older claim, may be put back"),
    ],
)
def test_a_stream_resumed_by_its_claim_is_never_spliced(
    log: tuple[Chunk, ...], newest: int, short: str
) -> None:
    """The client has "ab", whose last token is of claim 7."""
    stream, frames = TokenStream("r", JOB_ID, 2, 7), list[str]()
    stream.meet_log(newest, log, frames)
    for logged in log:
        stream.feed_logged(logged, frames)
    assert told(frames) == short


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[list[Chunk]], list[str]]:
    """The log after each append, and the text of each run; a run may lose its log."""
    logs: list[list[Chunk]] = [[]]
    runs: list[str] = []
    epoch = 0
    for run in range(draw(st.integers(1, 3))):
        text = draw(st.text("abcdefgh", min_size=1, max_size=12))
        log: list[Chunk] = []
        position = 0
        new = run > 0
        epoch += 1
        while position < len(text):
            if log and draw(st.booleans()):
                epoch += 1
            size = draw(st.integers(1, 4))
            part = text[position : position + size]
            last = run == 99
            log = [*log, chunk(position, part, epoch=epoch, new=new, end=last)]
            logs.append(log)
            new = False
            position += len(part)
        runs.append(text)
    final = logs[-1]
    ended = Chunk(JOB_ID, epoch, len(runs[-1]), (), End("stop"))
    logs.append([*final, ended])
    return logs, runs


@given(histories(), st.data())
def test_over_any_losses_the_last_run_arrives_whole(
    history: tuple[list[list[Chunk]], list[str]], data: st.DataObject
) -> None:
    logs, runs = history
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    for log in logs[1:]:
        fate = data.draw(st.sampled_from(["kept", "kept", "twice", "lost"]))
        if fate == "lost":
            continue
        for _ in range(2 if fate == "twice" else 1):
            if not stream.feed(log[-1], frames):
                _read(stream, log, frames)
    if stream.end is None:  # as after a reconnect
        _read(stream, logs[-1], frames)
    short = told(frames)
    assert short.endswith(".")
    assert short.count(".") == 1
    seen = short[:-1].split("<")
    assert seen[-1] == runs[-1]
    # earlier runs were seen from their start, as far as they came
    assert all(any(run.startswith(part) for run in runs) for part in seen)


def _read(stream: TokenStream, log: list[Chunk], frames: list[str]) -> None:
    stream.meet_log(log[-1].epoch, tuple(log), frames)
    for logged in log:
        stream.feed_logged(logged, frames)
