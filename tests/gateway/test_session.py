"""The session: whatever comes in, requests are accounted for and errors stay with their sender."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.session import (
    MAX_FRAME_BYTES,
    MAX_LIVE_REQUESTS,
    Action,
    Cancel,
    Resume,
    Send,
    Session,
    Submit,
)
from openlora.errors import Overloaded

JOB_ID = "07" + "a" * 24


def frame(**fields: Any) -> str:
    return json.dumps(fields)


def generate(request_id: str, **fields: Any) -> str:
    return frame(type="generate", request_id=request_id, prompt="x", **fields)


def error_of(actions: list[Action]) -> dict[str, Any]:
    (action,) = actions
    assert isinstance(action, Send)
    error: dict[str, Any] = json.loads(action.frame)
    assert error["type"] == "error"
    return error


def test_a_request_is_submitted_and_its_id_is_taken_until_it_ends() -> None:
    session = Session()
    (submit,) = session.receive_text(generate("r1"))
    assert isinstance(submit, Submit)
    error = error_of(session.receive_text(generate("r1")))
    assert (error["code"], error["request_id"]) == ("invalid_request", "r1")
    session.started("r1", JOB_ID)
    assert error_of(session.receive_text(generate("r1")))["code"] == "invalid_request"
    session.ended("r1")
    assert isinstance(session.receive_text(generate("r1"))[0], Submit)


def test_a_failed_request_frees_its_id() -> None:
    session = Session()
    session.receive_text(generate("r1"))
    error = error_of(session.failed("r1", Overloaded("busy", retry_after_ms=10)))
    assert (error["request_id"], error["retry_after_ms"]) == ("r1", 10)
    assert isinstance(session.receive_text(generate("r1"))[0], Submit)


def test_a_cancel_before_the_job_exists_is_done_when_it_does() -> None:
    session = Session()
    session.receive_text(generate("r1"))
    assert session.receive_text(frame(type="cancel", request_id="r1")) == []
    assert session.started("r1", JOB_ID) == [Cancel("r1", JOB_ID)]


def test_a_cancel_of_a_running_request_names_its_job() -> None:
    session = Session()
    session.receive_text(generate("r1"))
    session.started("r1", JOB_ID)
    assert session.receive_text(frame(type="cancel", request_id="r1")) == [Cancel("r1", JOB_ID)]


def test_a_cancel_that_crosses_done_is_no_error_but_one_of_nothing_is() -> None:
    session = Session()
    session.receive_text(generate("r1"))
    session.started("r1", JOB_ID)
    session.ended("r1")
    assert session.receive_text(frame(type="cancel", request_id="r1")) == []
    assert (
        "not running"
        in error_of(session.receive_text(frame(type="cancel", request_id="r2")))["message"]
    )


def test_resume_asks_for_what_follows_the_last_token() -> None:
    session = Session()
    actions = session.receive_text(frame(type="resume", request_id="r", job_id=JOB_ID, after=17))
    assert actions == [Resume("r", JOB_ID, 17, 0)]
    asked = frame(type="resume", request_id="s", job_id=JOB_ID, after=17, epoch=5)
    assert session.receive_text(asked) == [Resume("s", JOB_ID, 17, 5)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"job_id": "x", "after": 0},
        {"job_id": "../../etc/passwd", "after": 0},
        {"job_id": JOB_ID.upper(), "after": 0},
        {"job_id": JOB_ID, "after": -2},
        {"job_id": JOB_ID, "after": 1 << 60},
        {"job_id": JOB_ID, "after": 0, "epoch": -1},
        {"job_id": JOB_ID, "after": 0, "epoch": 1 << 60},
    ],
)
def test_a_resume_of_something_impossible_is_refused(wrong: dict[str, Any]) -> None:
    error = error_of(Session().receive_text(frame(type="resume", request_id="r", **wrong)))
    assert (error["code"], error["request_id"]) == ("invalid_request", "r")


@pytest.mark.parametrize("request_id", ["", "x" * 200])
def test_request_ids_have_a_length(request_id: str) -> None:
    error = error_of(Session().receive_text(generate(request_id)))
    assert "request_id has" in error["message"]
    assert len(error["request_id"]) <= 128


def test_beyond_the_limit_requests_are_told_to_wait() -> None:
    session = Session()
    for i in range(MAX_LIVE_REQUESTS):
        session.receive_text(generate(f"r{i}"))
    error = error_of(session.receive_text(generate("one more")))
    assert (error["code"], error["retriable"]) == ("overloaded", True)
    assert error["retry_after_ms"] > 0
    session.ended("r0")
    assert isinstance(session.receive_text(generate("one more"))[0], Submit)


@pytest.mark.parametrize(
    "text",
    [
        "x" * (MAX_FRAME_BYTES + 1),
        "ü" * (MAX_FRAME_BYTES // 2 + 1),
        generate("r", idempotency_key="k" * MAX_FRAME_BYTES),
    ],
)
def test_a_frame_over_one_mebibyte_is_too_large(text: str) -> None:
    error = error_of(Session().receive_text(text))
    assert (error["code"], error["request_id"]) == ("payload_too_large", None)


def test_a_frame_of_one_mebibyte_is_not_too_large() -> None:
    text = generate("r")
    padded = text + " " * (MAX_FRAME_BYTES - len(text))
    assert isinstance(Session().receive_text(padded)[0], Submit)


def test_binary_frames_are_refused() -> None:
    assert error_of(Session().receive_bytes(3))["code"] == "invalid_request"
    assert error_of(Session().receive_bytes(MAX_FRAME_BYTES + 1))["code"] == "payload_too_large"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
FIELDS = [
    "messages",
    "prompt",
    "adapter",
    "adapters",
    "merge",
    "params",
    "priority",
    "deadline_s",
    "idempotency_key",
    "job_id",
    "after",
]


@given(
    st.sampled_from(["generate", "cancel", "resume"]),
    st.text() | st.none(),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
)
def test_any_object_gives_one_job_or_one_error(
    kind: str, request_id: str | None, fields: dict[str, Any]
) -> None:
    session = Session()
    actions = session.receive_text(json.dumps({"type": kind, "request_id": request_id} | fields))
    if isinstance(actions[0], Submit | Resume):
        assert list(session.live) == [request_id]
    else:
        assert error_of(actions)["code"] == "invalid_request"
        assert not session.live


@given(st.text())
def test_any_text_is_answered_and_harms_nothing(text: str) -> None:
    session = Session()
    session.receive_text(generate("r1"))
    assert error_of(session.receive_text(text))["code"] == "invalid_request"
    assert list(session.live) == ["r1"]


class SessionMachine(RuleBasedStateMachine):
    """Random orders of frames and news against a plain model of what is live."""

    ids = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.session = Session()
        self.starting: set[str] = set()
        self.running: set[str] = set()
        self.wants_cancel: set[str] = set()

    @rule(request_id=ids)
    def generates(self, request_id: str) -> None:
        (action,) = self.session.receive_text(generate(request_id))
        if request_id in self.starting | self.running:
            assert isinstance(action, Send)
        else:
            assert isinstance(action, Submit)
            self.starting.add(request_id)

    @rule(request_id=ids)
    def cancels(self, request_id: str) -> None:
        actions = self.session.receive_text(frame(type="cancel", request_id=request_id))
        if request_id in self.running:
            assert actions == [Cancel(request_id, JOB_ID)]
        elif request_id in self.starting:
            assert actions == []
            self.wants_cancel.add(request_id)
        else:
            assert all(isinstance(action, Send) for action in actions)

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def starts(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.starting)))
        actions = self.session.started(request_id, JOB_ID)
        assert actions == ([Cancel(request_id, JOB_ID)] if request_id in self.wants_cancel else [])
        self.starting.remove(request_id)
        self.wants_cancel.discard(request_id)
        self.running.add(request_id)

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.starting)))
        assert error_of(self.session.failed(request_id, Overloaded("no")))
        self.starting.remove(request_id)
        self.wants_cancel.discard(request_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        self.session.ended(request_id)
        self.running.remove(request_id)

    @invariant()
    def live_is_what_runs(self) -> None:
        assert set(self.session.live) == self.starting | self.running


SessionMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestSession = SessionMachine.TestCase
