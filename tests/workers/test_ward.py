"""The ward: who is in the engine while somebody is suspected. The engine here only listens."""

from __future__ import annotations

import itertools

import pytest

from openlora.joblog.crashes import Suspicion
from openlora.protocol.events import Token
from openlora.sampling_params import SamplingParams
from tests.workers.running import a_job
from workers.messages import Start
from workers.offsets import Position
from workers.run import Run
from workers.ward import TRIAL_TOKENS, Ward, trial_tokens


class Listener:
    """In the engine's place: what it holds, by ticket."""

    def __init__(self):
        self.inside = {}

    def start(self, start):
        assert start.ticket not in self.inside
        self.inside[start.ticket] = start

    def abort(self, ticket):
        del self.inside[ticket]


class Bench:
    def __init__(self, tokenizer):
        self.engine = Listener()
        self.tickets = itertools.count()
        self.runs = {}
        self.others = 0
        self.line_on_trial = False
        self.tokenizer = tokenizer
        self.ward = Ward(
            self.engine,
            next_ticket=lambda: next(self.tickets),
            rename=self.rename,
            is_open=lambda run: run.ticket in self.runs,
            step_aside=self.step_aside,
            line_on_trial=lambda: self.line_on_trial,
        )

    def step_aside(self):
        left, self.others = self.others, 0
        return left

    def rename(self, run, ticket):
        del self.runs[run.ticket]
        run.ticket = ticket
        self.runs[ticket] = run

    def admit(self, crashes=0):
        run = Run(a_job(), next(self.tickets), 1, Position(("t", 0), 0, 1), self.tokenizer, ())
        run.start = Start(run.ticket, (1, 2), SamplingParams(seed=1))
        run.suspicion = Suspicion(crashes)
        self.runs[run.ticket] = run
        self.ward.begin(run)
        return run

    def turn(self):
        self.ward.turn(list(self.runs.values()))

    def speak(self, run, count):
        run.tokens += [Token(7, "x")] * count
        self.turn()

    def end(self, run):
        del self.runs[run.ticket]
        self.engine.inside.pop(run.ticket, None)
        self.turn()

    def is_inside(self, *runs):
        return set(self.engine.inside) == {run.ticket for run in runs}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer

    from openlora.bench.pipeline_model import write_tokenizer

    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def bench(tokenizer):
    return Bench(tokenizer)


def test_nobody_waits_where_nobody_is_suspected(bench):
    runs = [bench.admit() for _ in range(3)]
    assert bench.is_inside(*runs)
    assert bench.ward.is_idle


def test_suspects_run_alone_one_after_the_other_and_the_others_go_on_after_them(bench):
    first, second = bench.admit(), bench.admit()
    bench.speak(first, 2)
    old_ticket = first.ticket
    suspects = [bench.admit(crashes=1), bench.admit(crashes=1)]
    bench.turn()
    assert bench.is_inside(suspects[0])
    late = bench.admit()  # nobody joins a trial
    bench.speak(suspects[0], TRIAL_TOKENS[0] - 1)
    assert bench.is_inside(suspects[0])
    bench.speak(suspects[0], 1)
    assert bench.is_inside(suspects[1])
    bench.speak(suspects[1], TRIAL_TOKENS[0])
    assert bench.is_inside(first, second, *suspects, late)
    assert bench.ward.is_idle
    assert first.ticket != old_ticket
    # it goes on behind what it had said
    assert bench.engine.inside[first.ticket].output_token_ids == (7, 7)
    assert len(bench.engine.inside[suspects[0].ticket].output_token_ids) == TRIAL_TOKENS[0]


def test_a_suspect_that_ends_or_leaves_makes_room_for_the_next(bench):
    innocent = bench.admit()
    suspects = [bench.admit(crashes=1) for _ in range(3)]
    bench.turn()
    del bench.runs[suspects[1].ticket]  # cancelled while it waited
    bench.end(suspects[0])
    assert bench.is_inside(suspects[2])
    bench.end(suspects[2])
    assert bench.is_inside(innocent)


def test_a_held_run_that_ended_meanwhile_is_not_started_again(bench):
    first, second = bench.admit(), bench.admit()
    suspect = bench.admit(crashes=2)
    bench.turn()
    del bench.runs[first.ticket]
    bench.end(suspect)
    assert bench.is_inside(second)


def test_runs_are_held_while_a_line_of_a_bundle_is_tried(bench):
    run = bench.admit()
    bench.line_on_trial = True
    assert not bench.ward.is_idle
    assert not bench.ward.has_suspects
    bench.turn()
    late = bench.admit()
    bench.turn()
    assert bench.is_inside()
    bench.line_on_trial = False
    bench.turn()
    assert bench.is_inside(run, late)
    assert bench.ward.is_idle


def test_lines_of_bundles_step_aside_for_a_suspected_job(bench):
    bench.others = 2
    suspect = bench.admit(crashes=1)
    bench.turn()
    assert bench.others == 0
    assert bench.is_inside(suspect)


def test_each_further_crash_makes_the_trial_longer_in_the_end_to_the_end(bench):
    assert [trial_tokens(Suspicion(n)) for n in (1, 2, 3, 4, 9)] == [
        4,
        32,
        256,
        *[float("inf")] * 2,
    ]
    suspect = bench.admit(crashes=4)
    other = bench.admit()
    bench.turn()
    bench.speak(suspect, 1000)
    assert bench.is_inside(suspect)
    bench.end(suspect)
    assert bench.is_inside(other)
