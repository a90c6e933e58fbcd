"""Every order of events of a small case: two workers, one job, crashes, fences and lost data."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import pytest

from gateway.stream import TokenStream
from tests.faults import simulation
from tests.faults.log_model import LogModel
from tests.faults.simulation import State, steps


@dataclass(frozen=True)
class Graph:
    """All states that can be reached, and the numbers of those that follow each of them."""

    states: list[State]
    followers: list[list[int]]


def visit(start: State) -> Graph:
    """From ``start`` on; every log on the way is checked."""
    simulation.forget()
    numbers, states, graph = {start: 0}, [start], []
    checked: set[LogModel] = set()
    for state in states:  # which grows meanwhile
        graph.append(followers := [])
        for what, after in steps(state):
            if after.log not in checked:
                check(state, what, after)
                checked.add(after.log)
            number = numbers.setdefault(after, len(states))
            if number == len(states):
                states.append(after)
            followers.append(number)
    return Graph(states, graph)


def check(before: State, what: str, after: State) -> None:
    """The log grows at its end alone, and each of its tokens was made behind those before it."""
    text = ()
    for chunk in after.log.chunks:
        assert chunk.first == len(text), (what, before, after)
        assert chunk.text[: chunk.first] == text, (what, before, after)
        assert not chunk.is_end or len(chunk.text) == simulation.TOKENS
        text = chunk.text
        assert after.log.epoch is not None
        assert chunk.epoch <= after.log.epoch
    epochs = [chunk.epoch for chunk in after.log.chunks]
    assert epochs == sorted(epochs), (what, before, after)


def can_end(graph: Graph) -> set[int]:
    """Numbers of states from which some future answers the client."""
    parents: list[list[int]] = [[] for _ in graph.states]
    for number, followers in enumerate(graph.followers):
        for after in followers:
            parents[after].append(number)
    good = {number for number, state in enumerate(graph.states) if state.client.ended}
    waiting = deque(good)
    while waiting:
        for parent in parents[waiting.popleft()]:
            if parent not in good:
                good.add(parent)
                waiting.append(parent)
    return good


def stuck(graph: Graph) -> list[State]:
    """States from which no future answers the client, though somebody may still claim."""
    good = can_end(graph)
    return [
        state for number, state in enumerate(graph.states) if number not in good and state.claims
    ]


SMALL = [(2, 2, 1, 0, 0), (2, 2, 0, 0, 1), (1, 3, 1, 0, 1)]
LARGE = [
    *((2, 3, 2, 0, 0), (2, 3, 1, 1, 0), (2, 3, 0, 0, 2), (2, 3, 1, 0, 1), (2, 2, 0, 1, 1)),
    (3, 2, 0, 0, 1),
]
"""Answers of three tokens have one in the middle, which neither begins nor ends a log."""


@pytest.mark.parametrize(
    ("tokens", "claims", "crashes", "losses", "lapses"),
    [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)],
)
def test_no_order_of_events_shows_a_client_anything_but_its_answer(
    tokens, claims, crashes, losses, lapses, monkeypatch
):
    monkeypatch.setattr(simulation, "TOKENS", tokens)
    graph = visit(State(claims=claims, crashes=crashes, losses=losses, lapses=lapses))
    assert len(graph.states) > 1000
    left = stuck(graph)
    assert not left, left[0]


def test_a_log_without_fences_would_be_found_out(monkeypatch):
    honest = LogModel.append

    def without_fences(self, chunk):
        if self.epoch is None:
            return honest(self, chunk)
        log, answer = honest(replace(self, epoch=chunk.epoch), chunk)
        return replace(log, epoch=self.epoch), answer

    monkeypatch.setattr(LogModel, "append", without_fences)
    with pytest.raises(AssertionError):
        visit(State(claims=2, crashes=1))


def test_counted_epochs_would_be_found_out(monkeypatch):
    """Without a clock, a claim after a crash of Redis has the number of one that was lost."""

    def counted(self, now, by=None):
        if self.epoch is None or self.ended:
            return self, "missing" if self.epoch is None else "ended"
        return replace(self, epoch=self.epoch + 1, base=self.length, by=by), "claimed"

    monkeypatch.setattr(LogModel, "claim", counted)
    with pytest.raises(AssertionError):
        visit(State(claims=3, crashes=0, lapses=1))


def test_a_worker_that_trusts_any_claim_it_sees_would_be_found_out(monkeypatch):
    """It let a job go for a claim that Redis loses, and whose worker dies."""
    monkeypatch.setattr(simulation, "TOKENS", 1)
    monkeypatch.setattr(simulation, "is_kept", lambda state, epoch: True)
    assert stuck(visit(State(claims=3, crashes=1, lapses=1)))


def test_a_gateway_that_trusts_any_log_would_be_found_out(monkeypatch):
    monkeypatch.setattr(TokenStream, "meet_log", lambda *args: None)
    with pytest.raises(AssertionError):
        visit(State(claims=2, crashes=0, lapses=1))


def test_a_client_that_names_no_claim_where_it_resumes_would_be_found_out(monkeypatch):
    """Its gateway died, and Redis lost its last moments with the worker that had them."""
    monkeypatch.setattr(simulation, "named_epoch", lambda client: 0)
    with pytest.raises(AssertionError):
        visit(State(claims=2, crashes=0, lapses=1))


def test_a_gateway_that_takes_an_older_claims_tokens_behind_a_newers_would_be_found_out(
    monkeypatch,
):
    def trusting(self, chunk, frames):
        if chunk.first_index <= self.next_index:
            self._take(chunk, frames)

    monkeypatch.setattr(simulation, "TOKENS", 3)
    monkeypatch.setattr(TokenStream, "feed_logged", trusting)
    with pytest.raises(AssertionError):
        visit(State(claims=2, crashes=0, lapses=1))
