"""Frames: the hand-assembled token frame is the JSON it stands for; bad input is explained."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.frames import (
    BadFrame,
    CancelFrame,
    Generate,
    ResumeFrame,
    decode_client_frame,
    end_frame,
    error_frame,
    token_frame,
    token_prefix,
    with_epoch,
)
from openlora.errors import Overloaded
from openlora.protocol.events import Candidate, End, Failure, Token

# what JSON and UTF-8 can carry: everything but lone surrogates
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts, texts, st.integers(0, 1 << 40), st.integers(0, 1 << 31))
def test_a_token_frame_is_the_json_of_its_fields(
    request_id: str, text: str, index: int, token_id: int
) -> None:
    frame = token_frame(token_prefix(request_id, "ab"), index, Token(token_id, text))
    frame.encode()
    assert json.loads(with_epoch(frame, index)) == json.loads(frame) | {"epoch": index}
    assert json.loads(frame) == {
        "type": "token",
        "request_id": request_id,
        "job_id": "ab",
        "index": index,
        "token_id": token_id,
        "text": text,
        "logprob": None,
    }


@given(texts, st.floats(-100, 0), st.lists(st.tuples(st.integers(0, 9), texts, st.floats(-9, 0))))
def test_a_token_frame_with_logprobs_lists_the_alternatives(
    text: str, logprob: float, others: list[tuple[int, str, float]]
) -> None:
    token = Token(7, text, logprob, tuple(Candidate(*other) for other in others))
    frame = json.loads(token_frame(token_prefix("r", "ab"), 0, token))
    assert (frame["text"], frame["logprob"]) == (text, logprob)
    assert frame["top_logprobs"] == [{"token_id": i, "text": t, "logprob": p} for i, t, p in others]


def test_the_three_client_frames_are_told_apart_by_type() -> None:
    kinds = {
        Generate: '{"type":"generate","request_id":"r","prompt":"x"}',
        CancelFrame: '{"type":"cancel","request_id":"r"}',
        ResumeFrame: '{"type":"resume","request_id":"r","job_id":"ab","after":3}',
    }
    for kind, text in kinds.items():
        assert isinstance(decode_client_frame(text), kind)


@pytest.mark.parametrize(
    ("text", "request_id", "words"),
    [
        ("", None, "not JSON"),
        ("{", None, "not JSON"),
        ("nonsense", None, "not JSON"),
        ("[]", None, "object"),
        ("null", None, "object"),
        ("{}", None, "type is missing: it must be 'generate', 'cancel' or 'resume'"),
        ('{"request_id":"r","type":null}', "r", "type is null: it must be 'generate', "),
        ('{"type":"shout","request_id":"r"}', "r", '"shout"'),
        ('{"type":5,"request_id":"r"}', "r", "type is 5"),
        ('{"type":"generate","prompt":"x"}', None, "request_id"),
        ('{"type":"generate","request_id":7}', None, "request_id is 7"),
        ('{"type":"generate","request_id":"r","prmpt":"x"}', "r", "prmpt"),
        ('{"type":"generate","request_id":"r","params":{"temprature":1}}', "r", "temprature"),
        (
            '{"type":"generate","request_id":"r","params":{"max_tokens":"12"}}',
            "r",
            'params.max_tokens is "12"',
        ),
        ('{"type":"generate","request_id":"r","params":{"top_p":true}}', "r", "top_p is true"),
        ('{"type":"generate","request_id":"r","params":{"top_p":1e999}}', "r", "top_p is Infinity"),
        (
            '{"type":"generate","request_id":"r","adapters":[{"id":"a","weight":NaN}]}',
            "r",
            "not JSON, which has no NaN; send finite numbers",
        ),
        ('{"type":"resume","request_id":"r","job_id":"ab","after":-Infinity}', "r", "-Infinity"),
        (
            '{"type":"generate","request_id":"r","messages":[{"role":"user","content":"x"},{"role":1,'
            '"content":"y"}]}',
            "r",
            "messages[1].role is 1",
        ),
        (
            '{"type":"generate","request_id":"r","priority":"urgent"}',
            "r",
            "priority is \"urgent\": it must be 'interactive' or 'batch'",
        ),
        ('{"type":"resume","request_id":"r","job_id":"ab","after":"x"}', "r", 'after is "x"'),
        ('{"type":"generate","request_id":"r","x":' + "[" * 50_000, None, "JSON"),
        ('{"x":' + "[" * 5000 + "]" * 5000 + ',"type":"cancel"}', None, "recursion"),
        ('{"type":"cancel","request_id":' + "[" * 990 + "]" * 990 + "}", None, "request_id"),
        (
            '{"type":"generate","request_id":"r","params":{"top_p":"x"},"params":1}',
            "r",
            "params.top_p: Expected",
        ),
        ('{"type":"generate","request_id":"r","adapters":[1],"adapters":[]}', "r", "adapters[0]"),
        ('{"type":"generate","request_id":"\\ud800"}', None, "not JSON"),
        ('{"type":"generate","request_id":"\ud800"}', None, "not JSON"),
    ],
)
def test_a_bad_frame_is_explained(text: str, request_id: str | None, words: str) -> None:
    with pytest.raises(BadFrame) as caught:
        decode_client_frame(text)
    assert words in caught.value.message
    assert caught.value.request_id == request_id


def test_a_long_value_is_shortened_in_the_message() -> None:
    text = json.dumps({"type": "generate", "request_id": "r", "params": {"seed": "x" * 5000}})
    with pytest.raises(BadFrame) as caught:
        decode_client_frame(text)
    assert len(caught.value.message) < 300


def test_an_end_is_done_or_error() -> None:
    done = json.loads(end_frame("r", "ab", End("stop", text="!", prompt_tokens=2)))
    assert (done["type"], done["finish_reason"], done["text"]) == ("done", "stop", "!")
    assert done["usage"] == {"prompt_tokens": 2, "completion_tokens": 0}
    assert set(done["timings"]) == {"queue_ms", "ttft_ms", "total_ms"}
    failed = json.loads(end_frame("r", "ab", End(failure=Failure("prompt_too_long", "600 > 512"))))
    assert failed == {
        "type": "error",
        "request_id": "r",
        "job_id": "ab",
        "code": "prompt_too_long",
        "message": "600 > 512",
        "retriable": False,
    }


def test_an_error_frame_carries_the_delay_where_there_is_one() -> None:
    frame = json.loads(error_frame(Overloaded("busy", retry_after_ms=500), None))
    assert frame == {
        "type": "error",
        "request_id": None,
        "code": "overloaded",
        "message": "busy",
        "retriable": True,
        "retry_after_ms": 500,
    }
