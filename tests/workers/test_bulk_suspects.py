"""Lines that were in engines when they crashed, in the bulk lane alone."""

from __future__ import annotations

import base64

import pytest

from openlora.bench.pipeline_model import write_tokenizer
from openlora.joblog.crashes import Suspicion
from openlora.protocol.bulk import (
    decode_bulk_message,
    line_job_id,
)
from openlora.protocol.crashes import Crash
from openlora.protocol.jobs import AdapterRef
from tests.workers.bulk_bench import FACTS, Bench, bundle, line
from workers.tokenizer import PromptTokenizer
from workers.ward import TRIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return PromptTokenizer(str(write_tokenizer(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def bench(tokenizer, tmp_path):
    return Bench(tokenizer, tmp_path)


SUSPECTED = Suspicion(1, 0, (Crash(1, "w", "SIGABRT", 3),))
DEADLY = Suspicion(3, 2, (*SUSPECTED.story, *[Crash(2, "w", "SIGABRT", 1)] * 2))


def test_suspected_lines_run_alone_until_they_have_made_a_few_tokens(bench):
    bench.suspicions = {2: SUSPECTED, 3: SUSPECTED}
    bench.deliver(bundle(line(1), line(2), line(3)))
    bench.lane.refill(0)
    assert list(bench.engine.started) == [0]
    assert bench.lane.is_on_trial
    for _ in range(TRIAL_TOKENS[0]):
        bench.lane.refill(0)
        assert list(bench.engine.started) == [0]
        bench.say(0)
    assert bench.engine.aborted == [0]
    bench.lane.refill(0)
    bench.say(1, finish_reason="length")
    assert not bench.lane.is_on_trial
    bench.lane.refill(0)
    assert list(bench.engine.started) == [0, 1, 2, 3]  # line 1, and line 2 from its start
    for ticket in (2, 3):
        bench.say(ticket, finish_reason="length")
    assert sorted(answer.line for answer in bench.answers) == [1, 2, 3]


def test_suspected_lines_wait_for_interactive_jobs_but_not_for_ever(bench, monkeypatch):
    bench.suspicions = {1: SUSPECTED}
    bench.others_inside = True
    bench.deliver(bundle(line(1)))
    bench.lane.refill(1)
    assert not bench.engine.started
    assert not bench.lane.is_on_trial
    monkeypatch.setattr("workers.bulk_suspects.PATIENCE_S", 0)
    assert bench.lane.is_on_trial
    bench.lane.refill(1)
    assert not bench.engine.started, "the jobs have to leave the engine first"
    bench.others_inside = False
    bench.lane.refill(1)
    assert bench.engine.started


def test_a_line_that_killed_alone_is_given_up_with_a_letter(bench):
    bench.suspicions = {2: DEADLY}
    bench.deliver(bundle(line(1), line(2)))
    bench.lane.refill(0)
    bench.say(0, finish_reason="length")
    assert {a.line: a.failure and a.failure.code for a in bench.answers} == {1: None, 2: "internal"}
    [letter] = bench.outlet.letters
    assert letter.job_id == line_job_id("batch_1", "hash", 2)
    assert letter.story == DEADLY.story
    held = decode_bulk_message(base64.b64decode(letter.value))
    assert [one.line for one in held.lines] == [2]


def test_lines_of_a_quarantined_adapter_fail(bench, tmp_path):
    (tmp_path / ("0" * 64)).mkdir()
    bench.quarantined = {"0" * 64: "it ended the engine"}
    bench.deliver(bundle(line(1), adapters=(AdapterRef("a", 1, "0" * 64),)))
    bench.lane.refill(0)
    assert [(a.failure.code, a.failure.message) for a in bench.answers] == [
        ("adapter_failed", "it ended the engine")
    ]


@pytest.mark.parametrize("is_running", [True, False])
def test_suspected_lines_that_are_dropped_hold_nobody(bench, monkeypatch, is_running):
    monkeypatch.setattr("workers.bulk_suspects.PATIENCE_S", 0)
    bench.suspicions = {1: SUSPECTED, 2: SUSPECTED}
    bench.others_inside = not is_running
    bench.deliver(bundle(line(1), line(2), line(3)))
    bench.lane.refill(0)
    assert bool(bench.engine.started) == is_running
    assert bench.lane.is_on_trial
    bench.outlet.stopped = frozenset({"batch_1"})
    bench.upkeep()
    assert not bench.lane.is_on_trial
    assert not bench.lane.could_admit(0)
    assert bench.lane.is_idle
    assert not bench.outlet.watched


def test_a_trial_does_not_begin_before_the_lines_in_the_engine_have_ended(bench, monkeypatch):
    """Jobs are held for a trial: they must not wait for lines that run on as well."""
    monkeypatch.setattr("workers.bulk_suspects.PATIENCE_S", 0)
    bench.deliver(bundle(line(1)))
    bench.lane.refill(0)
    bench.suspicions = {2: SUSPECTED}
    bench.deliver(bundle(line(2), line(3)), 1)
    bench.lane.refill(1)
    assert list(bench.engine.started) == [0]
    assert not bench.lane.is_on_trial
    bench.say(0, finish_reason="length")
    assert bench.lane.is_on_trial
    bench.lane.refill(1)
    assert list(bench.engine.started) == [0, 1]


def test_a_trial_begins_where_held_jobs_would_take_all_room(bench, monkeypatch):
    monkeypatch.setattr("workers.bulk_suspects.PATIENCE_S", 0)
    bench.suspicions = {1: SUSPECTED}
    bench.deliver(bundle(line(1)))
    bench.lane.refill(0)
    bench.say(0, finish_reason="length")
    bench.deliver(bundle(line(1), line(2)), 1)
    bench.others_inside = True
    bench.lane.refill(0)
    assert bench.lane.is_on_trial
    bench.others_inside = False
    bench.lane.refill(FACTS.max_num_seqs)
    assert list(bench.engine.started) == [0, 1]


def test_lines_step_aside_and_run_from_their_start_afterwards(bench):
    bench.deliver(bundle(line(1), line(2), line(3)))
    bench.lane.refill(0)
    bench.say(0)
    assert bench.lane.step_aside() == 3
    assert sorted(bench.engine.aborted) == [0, 1, 2]
    assert bench.lane.lines_in_engine == 0
    bench.say(0, finish_reason="length")  # was on its way
    bench.lane.refill(0)
    for ticket in (3, 4, 5):
        bench.say(ticket, finish_reason="length")
    assert [answer.line for answer in bench.answers] == [1, 2, 3]


def test_a_line_on_trial_that_steps_aside_is_tried_again(bench):
    bench.suspicions = {1: SUSPECTED}
    bench.deliver(bundle(line(1)))
    bench.lane.refill(0)
    bench.say(0)
    assert bench.lane.step_aside() == 1
    assert not bench.lane.is_on_trial
    bench.lane.refill(0)
    for _ in range(TRIAL_TOKENS[0]):
        assert bench.engine.aborted == [0]
        bench.say(1)
    assert bench.engine.aborted == [0, 1]
