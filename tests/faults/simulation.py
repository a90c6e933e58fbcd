"""The message flow as a small state machine: two workers, one job, and everything that can happen.

The state is small and frozen, so all of it can be visited. What each part does is what the real
parts do: the log is the model that ``test_log_model.py`` holds against the scripts; the client is
the gateway's own ``TokenStream``, fed as ``gateway.relay`` does; a worker claims, appends what the
log lacks and obeys answers as ``workers.token_sink`` does. No two runs make the same text, so that
a mixture of two would be seen. Nothing is assumed about time but one thing: what Redis has held
when an ended run says its end again, it does not lose any more. Any step may come at any moment, a
reply may be lost, a worker that was thought dead may go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from gateway.stream import TokenStream
from openlora.protocol.events import Chunk as WireChunk
from openlora.protocol.events import End, Token
from tests.faults.log_model import Chunk, LogModel, Text, replace

TOKENS = 2
JOB_ID = "00" * 13
LOST = LogModel(epoch=None)


@dataclass(frozen=True)
class Worker:
    """``epoch`` None: it does not have the job, or only its message (``holds_message``). ``text``:
    the tokens it knows; ``logged`` of them it knows to be in the log. ``said_all``: it heard that
    its end is in the log, and will say it again. ``watched``: it let the job go, and looks whose it
    is until a claim that it has seen is one that Redis keeps (0: it has not looked yet)."""

    epoch: int | None = None
    text: Text = ()
    logged: int = 0
    restarted: bool = False
    said_all: bool = False
    holds_message: bool = False
    watched: int | None = None


@dataclass(frozen=True)
class Client:
    """What a gateway's stream has sent since it last said ``restarted``, and how it stands."""

    text: Text = ()
    epoch: int = 0
    ended: bool = False


@dataclass(frozen=True)
class State:
    """``kept``: what Redis falls back to where it loses its last moments. ``owner``: the worker
    whose the partition is. ``committed``: its message is done with. ``claims``, ``crashes``,
    ``losses``, ``lapses``: how many more may happen; without an end to them there would be none to
    the states."""

    log: LogModel = field(default_factory=LogModel)
    kept: LogModel = field(default_factory=LogModel)
    workers: tuple[Worker, Worker] = field(default_factory=lambda: (Worker(), Worker()))
    client: Client = field(default_factory=Client)
    owner: int = 0
    clock: int = 0
    committed: bool = False
    claims: int = 3
    crashes: int = 1
    losses: int = 0
    lapses: int = 0


def steps(state: State) -> Iterator[tuple[str, State]]:
    """Everything that can happen next."""
    for number, worker in enumerate(state.workers):
        yield from worker_steps(state, number, worker)
    if state.client.ended:
        return
    yield "owner changes", replace(state, owner=1 - state.owner)
    yield "client reads the log", replace(state, client=read(state.client, state.log))
    yield "client resumes elsewhere", replace(state, client=resume(state.client, state.log))
    if state.losses:
        lost = replace(state, log=LOST, kept=LOST, losses=state.losses - 1)
        yield "Redis loses its data", lost
    if state.lapses and state.kept != state.log:
        yield "Redis keeps what it has", replace(state, kept=state.log)
        lapsed = replace(state, log=state.kept, lapses=state.lapses - 1)
        yield "Redis loses its last moments", lapsed
    if state.log == LOST and state.committed and not any(map(has_it, state.workers)):
        yield "client is told that its job was lost", ended(state)


def ended(state: State) -> State:
    return replace(state, client=replace(state.client, ended=True))


def has_it(worker: Worker) -> bool:
    return worker.epoch is not None or worker.holds_message


def worker_steps(state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
    if state.crashes and (has_it(worker) or worker.watched is not None):
        yield f"worker {number} crashes", crash(state, number)
    if worker.epoch is None:
        if worker.watched is not None:
            yield f"worker {number} looks whose the job is", look(state, number, worker)
        if state.claims and (worker.holds_message or is_found(state, number)):
            yield from claim(replace(state, claims=state.claims - 1), number)
        return
    if worker.said_all:
        yield from say_end_again(state, number, worker)
        return
    if len(worker.text) < TOKENS:
        made = replace(worker, text=(*worker.text, worker.epoch))
        yield f"worker {number} makes a token", put(state, number, made)
    if len(worker.text) > worker.logged or len(worker.text) == TOKENS:
        yield from append(state, number, worker)


def crash(state: State, number: int) -> State:
    """Whoever starts in its place has another name: what it claimed is seen to be nobody's."""
    log, kept = (
        replace(log, by=None) if log.by == number else log for log in (state.log, state.kept)
    )
    return put(replace(state, log=log, kept=kept, crashes=state.crashes - 1), number, Worker())


def is_found(state: State, number: int) -> bool:
    """Whether the job's message comes to a worker: the first one, or the sweeper's."""
    if state.owner != number:
        return False
    is_nobodys = state.log != LOST and not state.log.ended and state.log.by is None
    return not state.committed or is_nobodys


def claim(state: State, number: int) -> Iterator[tuple[str, State]]:
    now = state.clock + 1
    log, answer = state.log.claim(now, number)
    restarted = False
    if answer == "missing":
        log, answer = state.log.recreate(now, number)
        restarted = log.length == 0
    state = replace(state, log=log, clock=now)
    if answer == "claimed":
        taken = Worker(log.epoch, log.text, log.length, restarted)
        yield f"worker {number} claims", put(state, number, taken)
    else:
        skipped = replace(state.workers[number], holds_message=False)
        yield f"worker {number} skips", put(committed(state, number), number, skipped)


def append(state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
    """The chunk reaches the log, and the answer the worker or not: then it is sent again."""
    is_end = len(worker.text) == TOKENS
    assert worker.epoch is not None
    restarted = worker.restarted and worker.logged == 0 and not is_end
    chunk = Chunk(worker.epoch, worker.logged, worker.text, is_end, restarted)
    log, answer = state.log.append(chunk)
    logged = replace(state, log=log)
    if log != state.log:
        yield f"worker {number} appends, the answer is lost", logged
        heard = replace(logged, client=hear(state.client, chunk))
        yield f"worker {number} appends, the client hears, the answer is lost", heard
        yield f"worker {number} appends, the client hears", answered(heard, number, worker, answer)
    yield f"worker {number} appends: {answer}", answered(logged, number, worker, answer)


def answered(state: State, number: int, worker: Worker, answer: str) -> State:
    """As ``TokenSink._judge`` and the loop's part in it."""
    if answer == "taken":
        if len(worker.text) == TOKENS:
            said = replace(worker, logged=TOKENS, said_all=True)
            return put(committed(state, number), number, said)
        return put(state, number, replace(worker, logged=len(worker.text)))
    if answer == "gap" and state.log.length <= len(worker.text):
        return put(state, number, replace(worker, logged=state.log.length))
    if answer == "fenced":
        return let_go(state, number)
    if answer != "gap":
        assert worker.epoch is not None
        log, said = state.log.restore(worker.epoch, number)
        state = replace(state, log=log)
        if said != "claimed":
            return let_go(state, number)
        if worker.text[: log.length] == log.text:
            return put(state, number, replace(worker, logged=log.length))
    return put(state, number, Worker(holds_message=True))


def say_end_again(state: State, number: int, worker: Worker) -> Iterator[tuple[str, State]]:
    """As ``EndedRuns.turn``: until the log has the end, once."""
    assert worker.epoch is not None
    chunk = Chunk(worker.epoch, worker.logged, worker.text, is_end=True)
    log, answer = state.log.append(chunk)
    if answer == "taken" and log == state.log:
        yield f"worker {number}'s end was kept", put(replace(state, kept=log), number, Worker())
        return
    after = answered(replace(state, log=log), number, worker, answer)
    then = after.workers[number]
    if then.holds_message:  # it has no message any more
        log, _ = after.log.disown(after.clock + 1, number)
        after = put(replace(after, log=log, clock=after.clock + 1), number, Worker(watched=0))
    yield f"worker {number} says its end again: {answer}", after


def look(state: State, number: int, worker: Worker) -> State:
    """As ``LetGo.turn``. A claim that was there at the last look is one that Redis keeps."""
    log, seen = state.log.disown(state.clock + 1, number)
    if log != state.log:
        state = replace(state, log=log, clock=state.clock + 1)
    elif seen is None or (seen == worker.watched and is_kept(state, seen)):
        return put(state, number, replace(worker, watched=None))
    return put(state, number, replace(worker, watched=seen))


def is_kept(state: State, epoch: int) -> bool:
    return not state.lapses or (state.kept.epoch is not None and state.kept.epoch >= epoch)


def let_go(state: State, number: int) -> State:
    return put(committed(state, number), number, Worker(watched=0))


def committed(state: State, number: int) -> State:
    """An end that another than the partition's owner tells is ignored."""
    return replace(state, committed=state.committed or state.owner == number)


def put(state: State, number: int, worker: Worker) -> State:
    workers = list(state.workers)
    workers[number] = worker
    return replace(state, workers=(workers[0], workers[1]))


def forget() -> None:
    """What clients were seen to do; before a search with another rule."""
    for seen in (hear, read, resume):
        seen.cache_clear()


def wire(chunk: Chunk) -> WireChunk:
    """Each token's ID says which token it is and which came before it."""
    ends = range(chunk.first + 1, len(chunk.text) + 1)
    tokens = tuple(Token(int.from_bytes(bytes(chunk.text[:end])), "") for end in ends)
    end = End("stop") if chunk.is_end else None
    return WireChunk(JOB_ID, chunk.epoch, chunk.first, tokens, end, chunk.restarted)


@cache
def hear(client: Client, chunk: Chunk) -> Client:
    """A published chunk; where the stream wants the log instead, nothing is sent."""
    stream, frames = stream_of(client), []
    stream.feed(wire(chunk), frames)
    return checked(client, stream, frames)


@cache
def read(client: Client, log: LogModel) -> Client:
    """As ``Relay.refill``."""
    if log.epoch is None:
        return client
    stream = stream_of(client)
    return catch_up(client, stream, log, whole=not stream.next_index or log.epoch != stream.epoch)


@cache
def resume(client: Client, log: LogModel) -> Client:
    """As ``Connection._resume``: a gateway that knows nothing but what the client tells it."""
    if log.epoch is None:
        return client
    stream = TokenStream("r", JOB_ID, len(client.text), named_epoch(client))
    return catch_up(client, stream, log, whole=True)


def named_epoch(client: Client) -> int:
    """The claim that made the client's last token, as frames name it."""
    return client.text[-1] if client.text else 0


def catch_up(client: Client, stream: TokenStream, log: LogModel, *, whole: bool) -> Client:
    """As ``Follower.catch_up``."""
    frames: list[str] = []
    chunks = tuple(map(wire, log.chunks))
    if whole:
        assert log.epoch is not None
        stream.meet_log(log.epoch, chunks, frames)
    for chunk in chunks:
        stream.feed_logged(chunk, frames)
    return checked(client, stream, frames)


def stream_of(client: Client) -> TokenStream:
    stream = TokenStream("r", JOB_ID, len(client.text), client.text[-1] if client.text else 0)
    stream.epoch = client.epoch
    if client.ended:
        stream.end = End("stop")
    return stream


def checked(before: Client, stream: TokenStream, frames: list[str]) -> Client:
    """No gap, no repeat, each token made behind those that were sent, the end only at the end."""
    text, is_over = before.text, before.ended
    for frame in map(json.loads, frames):
        assert not is_over, frames
        if frame["type"] == "restarted":
            text = ()
        elif frame["type"] == "token":
            token = tuple(frame["token_id"].to_bytes(len(text) + 1))
            assert (frame["index"], token[:-1]) == (len(text), text), frames
            text = token
        else:
            assert frame["type"] == "done"
            assert len(text) == TOKENS, frames
            is_over = True
    return Client(text, stream.epoch, is_over)
