"""The bulk lane alone: room, answers, what it lets go."""

from __future__ import annotations

import pytest

from openlora.bench.pipeline_model import write_tokenizer
from openlora.protocol.bulk import BulkAnswers
from openlora.protocol.codec import encode
from openlora.protocol.events import Candidate, Token
from openlora.protocol.jobs import AdapterRef
from tests.workers.bulk_bench import Bench, bundle, line
from workers.backlog import Fetched
from workers.bulk_bundles import is_bundle
from workers.messages import Fault
from workers.offsets import Position
from workers.tokenizer import PromptTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return PromptTokenizer(str(write_tokenizer(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def bench(tokenizer, tmp_path):
    return Bench(tokenizer, tmp_path)


def test_a_bundles_answers_leave_together_and_end_it_once_they_are_taken(bench):
    position = bench.deliver(bundle(line(1), line(2, max_tokens=2)))
    bench.lane.refill(0)
    first, second = bench.engine.started
    assert bench.engine.started[first].priority == "batch"
    assert bench.engine.started[first].params.seed != bench.engine.started[second].params.seed
    bench.say(second, 600)
    bench.say(second, 700, finish_reason="length")
    assert not bench.outlet.messages
    bench.say(first, 0, finish_reason="stop")
    assert [(a.line, a.custom_id, a.text, a.finish_reason) for a in bench.answers] == [
        (2, "c2", " w600 w700", "length"),
        (1, "c1", "", "stop"),
    ]
    assert not bench.ended
    bench.outlet.acknowledge()
    assert bench.ended == [position]
    assert bench.lane.is_idle


def test_a_stop_string_ends_a_line_in_the_engine(bench):
    bench.deliver(bundle(line(1, stop=("w601",))))
    bench.lane.refill(0)
    [ticket] = bench.engine.started
    for token in (600, 601):
        bench.say(ticket, token)
    assert bench.engine.aborted == [ticket]
    assert [(a.text, a.finish_reason, a.completion_tokens) for a in bench.answers] == [
        (" w600 ", "stop", 2)
    ]
    bench.say(ticket, 602)  # was on its way
    assert len(bench.answers) == 1


def test_a_line_that_asked_is_told_its_logprobs(bench):
    bench.deliver(bundle(line(1, logprobs=2), line(2, logprobs=1), line(3)))
    bench.lane.refill(0)
    for ticket in bench.engine.started:
        bench.say(ticket, 600, logprob=-0.5, top_logprobs=((600, -0.5), (601, -1.0)))
        bench.say(ticket, 0, logprob=-0.1, finish_reason="stop")  # the end of the text is no text
    tokens = {answer.line: answer.tokens for answer in bench.answers}
    top = (Candidate(600, " w600", -0.5), Candidate(601, " w601", -1.0))
    assert tokens[1] == (Token(600, " w600", -0.5, top),)
    assert tokens[3] is None


def test_what_cannot_be_run_is_answered_and_the_rest_goes_on(bench):
    lost = (AdapterRef("a", 1, "0" * 64),)
    bench.deliver(bundle(line(1, prompt="x" * 500), line(2)))
    bench.deliver(bundle(line(3), adapters=lost), 1)
    bench.deliver(bundle(line(4), deadline_ms=1), 2)
    bench.deliver(b'{"type":"bulk","lines":1}', 3)
    bench.lane.refill(0)
    [ticket] = bench.engine.started
    bench.say(ticket, None, fault=Fault("adapter_failed", "broken"))
    codes = {answer.line: answer.failure.code for answer in bench.answers}
    assert codes == {
        1: "prompt_too_long",
        2: "adapter_failed",
        3: "adapter_failed",
        4: "deadline_exceeded",
    }
    assert bench.letters.codes == ["invalid_request"]


def test_lines_fill_the_seats_and_half_as_many_wait_behind_them(bench):
    bench.deliver(bundle(*(line(n) for n in range(1, 65))))
    bench.lane.refill(0)
    assert len(bench.engine.started) == 16 + 8
    assert not bench.lane.could_admit(0)
    bench.say(0, finish_reason="stop")
    assert bench.lane.could_admit(0)


def test_interactive_work_takes_seats_and_leaves_one_in_eight_free(bench):
    bench.deliver(bundle(*(line(n) for n in range(1, 65))))
    for _ in range(4):
        bench.lane.refill(4)
    assert len(bench.engine.started) == 16 - 2 - 4
    bench.lane.refill(0)  # the interactive jobs have just ended, others may follow
    assert len(bench.engine.started) == 16 - 2


def test_a_stopped_batch_is_dropped(bench):
    position = bench.deliver(bundle(line(1), line(2)))
    later = bench.deliver(bundle(line(3)), 1)
    bench.lane.refill(0)
    assert bench.outlet.watched == frozenset({"batch_1"})
    bench.outlet.stopped = frozenset({"batch_1"})
    bench.upkeep()
    assert set(bench.engine.aborted) == set(bench.engine.started)
    assert set(bench.ended) == {position, later}
    assert not bench.outlet.messages
    bench.deliver(bundle(line(4)), 2)
    bench.lane.refill(0)
    assert len(bench.ended) == 3


def test_bundles_of_partitions_that_moved_are_left_to_their_owner(bench):
    bench.deliver(bundle(*(line(n) for n in range(1, 65))))
    bench.lane.refill(0)
    bench.owned = False
    bench.upkeep()
    assert bench.engine.aborted
    assert bench.lane.is_idle
    assert not bench.lane.could_admit(0), "its other lines must not keep the loop turning"
    assert not bench.outlet.watched
    assert not bench.ended


def test_answers_too_long_for_a_message_are_split(bench, monkeypatch):
    monkeypatch.setattr("workers.bulk_lines.ANSWERS_BYTES", 400)
    bench.deliver(bundle(*(line(n) for n in range(1, 5))))
    bench.lane.refill(0)
    for ticket in bench.engine.started:
        for _ in range(10 + 80 * (ticket == 3)):
            bench.say(ticket, 20_000)
        bench.say(ticket, finish_reason="stop")
    assert len(bench.outlet.messages) > 1
    assert [a.line for a in bench.answers] == [1, 2, 3, 4]
    assert bench.answers[3].failure.code == "payload_too_large"
    assert all(isinstance(message, BulkAnswers) for message in bench.outlet.messages)


def test_single_jobs_are_no_bundles():
    position = Position(("openlora.batch", 0), 0, 1)
    assert is_bundle(Fetched(position, None, encode(bundle(line(1)))))
    assert not is_bundle(Fetched(position, None, b'{"job_id":"x"}'))
