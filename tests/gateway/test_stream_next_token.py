"""A stream's next token goes a shorter way: what it may be, what may not, and what both tell."""

from __future__ import annotations

import json

import pytest

from gateway.stream import TokenStream
from openlora.protocol.events import Candidate, Chunk, Token
from tests.gateway.chunks import JOB_ID, chunk, told

LOGPROB = Chunk(JOB_ID, 3, 1, (Token(98, "b", -0.5, (Candidate(7, "y", -1.0),)),))


def test_the_first_token_of_each_claim_names_it() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    stream.feed(chunk(0, "ab", epoch=3), frames)
    stream.feed(chunk(2, "c", epoch=3), frames)
    stream.feed_logged(chunk(3, "de", epoch=5), frames)
    stream.restart(frames)
    stream.feed(chunk(0, "x", epoch=5), frames)
    epochs = [json.loads(frame).get("epoch") for frame in frames]
    assert epochs == [3, None, None, 5, None, None, 5]


@pytest.mark.parametrize(
    ("next_chunk", "is_fed", "short", "epochs", "next_index"),
    [
        (chunk(1, "b", epoch=3), True, "ab", [3, None], 2),
        (LOGPROB, True, "ab", [3, None], 2),
        (chunk(1, "bc", epoch=3), True, "abc", [3, None, None], 3),
        (chunk(1, "", epoch=3), True, "a", [3], 1),
        (chunk(1, "b", epoch=3, end=True), True, "ab.", [3, None, None], 2),
        (chunk(0, "a", epoch=3), True, "a", [3], 1),
        (chunk(2, "c", epoch=3), False, "a", [3], 1),
        (chunk(1, "b", epoch=2), True, "a", [3], 1),
        (chunk(1, "b", epoch=4), False, "a", [3], 1),
        (chunk(0, "b", epoch=4, new=True), True, "a<b", [3, None, 4], 1),
    ],
    ids=[
        *("the next token", "with a logprob", "two tokens", "no token", "with the end"),
        *("a repeat", "behind a gap", "older claim", "newer claim", "begun anew"),
    ],
)
def test_whatever_comes_behind_a_token_that_told_its_claim(
    next_chunk: Chunk, is_fed: bool, short: str, epochs: list[int | None], next_index: int
) -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    assert stream.feed(chunk(0, "a", epoch=3), frames)
    assert stream.feed(next_chunk, frames) is is_fed
    assert told(frames) == short
    assert [json.loads(frame).get("epoch") for frame in frames] == epochs
    assert (stream.next_index, stream.token_epoch) == (next_index, 4 if "<" in short else 3)
    assert (stream.end is not None) is short.endswith(".")


def test_a_token_of_the_claim_told_is_dropped_once_a_newer_one_is_known() -> None:
    stream, frames = TokenStream("r", JOB_ID), list[str]()
    assert stream.feed(chunk(0, "a", epoch=3), frames)
    stream.feed_logged(chunk(1, "", epoch=4), frames)
    assert stream.feed(chunk(1, "b", epoch=3), frames)
    assert told(frames) == "a"
    assert stream.feed(chunk(1, "x", epoch=4), frames)
    assert [json.loads(frame).get("epoch") for frame in frames] == [3, 4]


def test_the_first_token_behind_a_resume_names_its_claim() -> None:
    stream, frames = TokenStream("r", JOB_ID, 2, 7), list[str]()
    assert stream.feed(chunk(2, "c", epoch=7), frames)
    assert stream.feed(chunk(3, "d", epoch=7), frames)
    assert [json.loads(frame).get("epoch") for frame in frames] == [7, None]
