"""Every order of events of a small case: two workers, one job, crashes, fences and lost data.

The state is small and frozen, so all of it can be visited. What each part does is what the real
parts do: the log is the model that ``test_log_model.py`` holds against the scripts; the client is
the gateway's own ``TokenStream``; a worker claims, appends what the log lacks and obeys answers as
``workers.token_sink`` does. Nothing is assumed about time: any step may come at any moment, a
reply may be lost, a worker that was thought dead may go on.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from gateway.stream import TokenStream
from openlora.protocol.events import Chunk as WireChunk
from openlora.protocol.events import End, Token
from tests.faults.log_model import Chunk, LogModel

TOKENS = 2
JOB_ID = "00" * 13


@dataclass(frozen=True)
class Worker:
    """``epoch`` None: it does not have the job. ``made``: tokens it knows; ``logged`` of them it
    knows to be in the log. ``doubtful``: it sent a chunk and has no answer."""

    epoch: int | None = None
    made: int = 0
    logged: int = 0
    restarted: bool = False


@dataclass(frozen=True)
class Client:
    """What a gateway's stream has sent: next index, epoch, ended, and how often it restarted."""

    next_index: int = 0
    epoch: int = 0
    ended: bool = False


@dataclass(frozen=True)
class State:
    """``owner``: the worker whose the partition is. ``claims``, ``crashes``, ``losses``: how many
    more may happen; without an end to them there would be none to the states."""

    log: LogModel = field(default_factory=LogModel)
    workers: tuple[Worker, Worker] = field(default_factory=lambda: (Worker(), Worker()))
    client: Client = field(default_factory=Client)
    owner: int = 0
    claims: int = 3
    crashes: int = 1
    losses: int = 0


def steps(state: State) -> Iterator[tuple[str, State]]:
    """Everything that can happen next."""
    for number, worker in enumerate(state.workers):
        yield from worker_steps(state, number, worker)
    if not state.client.ended:
        yield "owner changes", replace(state, owner=1 - state.owner)
        yield "client reads the log", replace(state, client=read(state.client, state.log))
    if state.losses and not state.log.ended:
        lost = LogModel(epoch=None)
        yield "Redis loses its data", replace(state, log=lost, losses=state.losses - 1)


def worker_steps(state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
    if state.crashes and worker.epoch is not None:
        crashed = put(replace(state, crashes=state.crashes - 1), number, Worker())
        yield f"worker {number} crashes", crashed
    if worker.epoch is None:
        if state.owner == number and state.claims:
            yield from claim(replace(state, claims=state.claims - 1), number)
        return
    if worker.made < TOKENS:
        yield (
            f"worker {number} makes a token",
            put(state, number, replace(worker, made=worker.made + 1)),
        )
    if worker.made > worker.logged or worker.made == TOKENS:
        yield from append(state, number, worker)


def claim(state: State, number: int) -> Iterator[tuple[str, State]]:
    log, answer = state.log.claim()
    restarted = False
    if answer == "missing":
        # An epoch above any that a lost log can have had: the real one is the clock.
        log, answer = state.log.recreate(100 + 10 * (2 - state.losses))
        restarted = True
    if answer == "claimed":
        taken = Worker(log.epoch, log.length, log.length, restarted and log.length == 0)
        yield f"worker {number} claims", put(replace(state, log=log), number, taken)


def append(state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
    """The chunk reaches the log, and the answer the worker or not: then it is sent again."""
    count = worker.made - worker.logged
    is_end = worker.made == TOKENS
    assert worker.epoch is not None
    chunk: Chunk = (worker.epoch, worker.logged, count, is_end, worker.restarted and not is_end)
    log, answer = state.log.append(chunk)
    logged = replace(state, log=log)
    if log != state.log:
        yield f"worker {number} appends, the answer is lost", logged
        heard = replace(logged, client=hear(state.client, chunk))
        yield f"worker {number} appends, the client hears, the answer is lost", heard
        yield f"worker {number} appends, the client hears", answered(heard, number, worker, answer)
    yield f"worker {number} appends: {answer}", answered(logged, number, worker, answer)


def answered(state: State, number: int, worker: Worker, answer: str) -> State:
    """As ``TokenSink._judge``."""
    if answer == "taken":
        if worker.made == TOKENS:
            return put(state, number, Worker())
        return put(state, number, replace(worker, logged=worker.made, restarted=False))
    if answer == "gap" and state.log.length <= worker.made:
        return put(state, number, replace(worker, logged=state.log.length))
    if answer == "gone" and state.owner == number and state.claims:
        state = replace(state, claims=state.claims - 1)
        assert worker.epoch is not None
        log, said = state.log.recreate(max(worker.epoch, 100 + 10 * (2 - state.losses)))
        if said == "claimed":
            restarted = log.length == 0
            logged = 0 if restarted else worker.logged
            again = replace(worker, epoch=log.epoch, logged=logged, restarted=restarted)
            return put(replace(state, log=log), number, again)
    return put(state, number, Worker())


def put(state: State, number: int, worker: Worker) -> State:
    workers = list(state.workers)
    workers[number] = worker
    return replace(state, workers=(workers[0], workers[1]))


def wire(chunk: Chunk) -> WireChunk:
    """Token IDs say their index, so that a wrong one is seen."""
    epoch, first, count, is_end, is_restart = chunk
    tokens = tuple(Token(1000 + first + n, "") for n in range(count))
    return WireChunk(JOB_ID, epoch, first, tokens, End("stop") if is_end else None, is_restart)


def hear(client: Client, chunk: Chunk) -> Client:
    """A published chunk; where the stream wants the log instead, nothing is sent."""
    stream, frames = stream_of(client), []
    stream.feed(wire(chunk), frames)
    return checked(client, stream, frames)


def read(client: Client, log: LogModel) -> Client:
    """The whole log, as a refill reads it."""
    if log.epoch is None:
        return client
    stream, frames = stream_of(client), []
    chunks = tuple(map(wire, log.chunks))
    stream.meet_log(chunks, frames)
    for chunk in chunks:
        stream.feed_logged(chunk, frames)
    return checked(client, stream, frames)


def stream_of(client: Client) -> TokenStream:
    stream = TokenStream("r", JOB_ID, client.next_index)
    stream.epoch = client.epoch
    if client.ended:
        stream.end = End("stop")
    return stream


def checked(before: Client, stream: TokenStream, frames: list[str]) -> Client:
    """No gap, no repeat, no token after the end, the end only behind the last token."""
    expected, ended = before.next_index, before.ended
    for frame in map(json.loads, frames):
        assert not ended, frames
        if frame["type"] == "restarted":
            expected = 0
        elif frame["type"] == "token":
            assert (frame["index"], frame["token_id"]) == (expected, 1000 + expected), frames
            expected += 1
        else:
            assert frame["type"] == "done"
            assert expected == TOKENS, frames
            ended = True
    return Client(expected, stream.epoch, ended)


def visit(start: State) -> dict[State, list[State]]:
    """All states that can be reached, each with those that follow; every one of them is checked."""
    graph: dict[State, list[State]] = {}
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        if state in graph:
            continue
        graph[state] = followers = []
        for what, after in steps(state):
            check(state, what, after)
            followers.append(after)
            if after not in graph:
                waiting.append(after)
    return graph


def check(before: State, what: str, after: State) -> None:
    """The log grows at its end alone, by the newest claim's worker."""
    index = 0
    for epoch, first, count, is_end, _ in after.log.chunks:
        assert first == index, (what, before, after)
        assert not is_end or first + count == TOKENS
        index += count
        assert after.log.epoch is not None
        assert epoch <= after.log.epoch
    epochs = [chunk[0] for chunk in after.log.chunks]
    assert epochs == sorted(epochs), (what, before, after)


def can_end(graph: dict[State, list[State]]) -> set[State]:
    """States from which some future answers the client."""
    parents: dict[State, list[State]] = {state: [] for state in graph}
    for state, followers in graph.items():
        for after in followers:
            parents[after].append(state)
    good = {state for state in graph if state.client.ended}
    waiting = deque(good)
    while waiting:
        for parent in parents[waiting.popleft()]:
            if parent not in good:
                good.add(parent)
                waiting.append(parent)
    return good


SMALL = [(3, 2, 0), (3, 1, 1)]
LARGE = [(4, 3, 0), (4, 2, 1), (4, 1, 2)]


@pytest.mark.parametrize(
    ("claims", "crashes", "losses"),
    [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)],
)
def test_no_order_of_events_shows_a_client_anything_but_its_answer(claims, crashes, losses):
    graph = visit(State(claims=claims, crashes=crashes, losses=losses))
    assert len(graph) > 1000
    # While somebody may still claim, some future answers the client.
    stuck = {state for state in graph.keys() - can_end(graph) if state.claims}
    assert not stuck, next(iter(stuck))


def test_a_log_without_fences_would_be_found_out(monkeypatch):
    honest = LogModel.append

    def without_fences(self, chunk):
        if self.epoch is None:
            return honest(self, chunk)
        log, answer = honest(replace(self, epoch=chunk[0]), chunk)
        return replace(log, epoch=self.epoch), answer

    monkeypatch.setattr(LogModel, "append", without_fences)
    with pytest.raises(AssertionError):
        visit(State(claims=2, crashes=1))
