"""The steps on a real Redis, run in this process: each twice, and with what can go wrong."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from openlora.errors import Overloaded
from openlora.joblog import JobLog
from openlora.protocol.status import AdapterRecord, PartitionStatus
from producer.bulk.app import do_step
from producer.bulk.keys import batch_key, contents_key
from producer.bulk.records import Step, StepKind
from producer.bulk.state import now_ms
from producer.bulk.steps import run_step
from producer.bulk.steward import Steward
from producer.bulk.workers_seen import heartbeats, nothing_pending
from tests.joblog.test_log import a_heartbeat
from tests.producer.bulk.stepwise import lines

pytestmark = pytest.mark.services


@pytest.mark.parametrize("times", [1, 2])
def test_steps_that_run_twice_change_nothing(producer, times, monkeypatch):
    monkeypatch.setattr("producer.bulk.reading.CHUNK_LINES", 40)
    batch_id = producer.submit(lines(150) + b"bad\n")
    producer.run(times)
    state = producer.states.get(batch_id)
    assert (state.phase, state.total, state.done, state.chunks) == ("running", 151, 1, 4)
    assert state.published == state.outstanding == 150
    sent = producer.sender.bundles
    # long runs: all of an adapter's lines of the batch side by side, 64 to a message
    assert [len(message.lines) for _, message in sent] == [64, 11, 64, 11]
    assert [key for key, _ in sent] in ([b"a", b"a", b"b", b"b"], [b"b", b"b", b"a", b"a"])
    producer.answer(batch_id, sent + sent[:2])
    producer.answer(batch_id, sent[:1], partition=1)
    assert producer.states.get(batch_id).answered == 150
    producer.steward.advance(batch_id)
    producer.run(times)
    state = producer.states.get(batch_id)
    assert (state.status, state.done, state.failed) == ("completed", 151, 1)
    assert (state.prompt_tokens, state.completion_tokens) == (300, 450)
    results = producer.results(batch_id)
    assert [r["line"] for r in results] == list(range(1, 152))
    assert [r.get("text") for r in results[:2]] == ["to p0", "to p1"]
    assert not producer.store.folder(batch_id).segments.exists()
    assert producer.states.open_ids() == []
    assert not producer.client.exists(contents_key(batch_id))
    producer.states.hold_contents(batch_id, ["a" * 64])  # a step that comes late
    assert producer.client.ttl(contents_key(batch_id)) > 0


def test_an_input_that_changed_fails_the_batch_and_says_where(producer, monkeypatch):
    monkeypatch.setattr("producer.bulk.reading.CHUNK_LINES", 40)
    batch_id = producer.submit(lines(100))
    [(_, step)] = producer.queue
    do_step(producer.tools, producer.steward, batch_id, step)
    producer.queue.pop(0)
    [path] = [p for p in (producer.store.root / "files").iterdir() if p.name.startswith("file-")]
    os.utime(path, ns=(1, 1))
    producer.run()
    state = producer.states.get(batch_id)
    assert state.status == "failed"
    assert "line 41" in producer.states.errors(batch_id)[0].message
    assert [r["error"]["code"] for r in producer.results(batch_id)] == ["invalid_request"] * 40
    gone = producer.submit(lines(3))
    for path in (producer.store.root / "files").iterdir():
        path.unlink()
    producer.run()
    assert producer.states.get(gone).status == "failed"
    assert "gone" in producer.states.errors(gone)[0].message


def test_an_input_of_too_many_lines_fails_the_batch(producer, monkeypatch):
    monkeypatch.setattr("producer.bulk.reading.CHUNK_LINES", 40)
    monkeypatch.setattr("producer.bulk.reading.MAX_LINES", 50)
    exact = producer.submit(lines(40) + b"\n" * 10)
    producer.run()
    assert producer.states.get(exact).phase == "running"
    batch_id = producer.submit(lines(40) + b"\n" * 11)
    producer.run()
    assert producer.states.get(batch_id).status == "failed"
    assert "more than 50 lines" in producer.states.errors(batch_id)[0].message
    assert len(producer.results(batch_id)) == 40


def test_a_full_disk_and_an_absent_broker_are_waited_out(producer):
    batch_id = producer.submit(lines(5))
    [entry] = producer.queue
    # where a folder is to be made, a file lies: no write succeeds, as on a full disk
    blocker = producer.store.root / "batches"
    blocker.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(OSError, match=r"exists|directory"):
            do_step(producer.tools, producer.steward, *entry)
    blocker.unlink()
    producer.sender.is_away = True
    with pytest.raises(Overloaded, match="no broker"):
        producer.run()
    assert producer.states.get(batch_id).published == 0
    producer.sender.is_away = False
    do_step(producer.tools, producer.steward, batch_id, Step("publish", 0))
    assert producer.states.get(batch_id).published == 5


def test_a_model_is_looked_up_among_the_living_workers(producer):
    line = {
        "custom_id": "1",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "tiny", "prompt": "p"},
    }
    batch_id = producer.submit(json.dumps(line).encode())
    with pytest.raises(Overloaded, match="line 1 names a model and no worker"):
        producer.run()
    JobLog(producer.client).write_heartbeat(a_heartbeat("w", model_id="tiny"))
    do_step(producer.tools, producer.steward, batch_id, Step("read", 0))
    producer.run()
    assert producer.states.get(batch_id).published == 1


def test_adapters_are_looked_up_for_the_tenant_and_by_version(producer):
    producer.registry.put(AdapterRecord("a", 0, "c" * 64, 8, (), "", 1, "", 1))
    private = AdapterRecord("own", 0, "d" * 64, 8, (), "", 1, "", 1, "other", "private")
    producer.registry.put(private)
    names = ["a", "a@1", "a@2", "a@9", "own"]
    batch_id = producer.submit(
        b"".join(json.dumps({"prompt": "p", "adapter": name}).encode() + b"\n" for name in names)
    )
    producer.run()
    used = {
        line.line: (ref.version, ref.hash[0])
        for _, message in producer.sender.bundles
        for line in message.lines
        for ref in message.group.adapters
    }
    assert used == {1: (2, "c"), 2: (1, "a"), 3: (2, "c")}
    assert [error.line for error in producer.states.errors(batch_id)] == [4, 5]
    producer.registry.put(AdapterRecord("new", 0, "e" * 64, 8, (), "", 1, "", 1))
    batch_id = producer.submit(b'{"prompt": "p", "adapter": "new"}')
    producer.run()
    assert producer.states.get(batch_id).published == 1


def test_a_step_that_was_lost_is_queued_again(producer):
    batch_id = producer.submit(lines(3))
    producer.queue.clear()
    producer.steward.advance(batch_id)
    assert producer.queue == []
    time.sleep(0.002)
    reborn = Steward(producer.states, producer.client, lambda *entry: producer.queue.append(entry))
    reborn.advance(batch_id)
    assert producer.queue == [(batch_id, Step("read", 0))]
    reborn.advance(batch_id)
    assert len(producer.queue) == 1


def test_results_outlive_a_step_that_comes_late(producer):
    """One that was held up where it began, while another did it and all that came after it."""
    batch_id = producer.submit(lines(4))
    producer.run()
    producer.answer(batch_id, producer.sender.bundles)
    producer.steward.advance(batch_id)
    [(_, step)] = producer.queue
    assert step == Step("assemble", 0)
    state = producer.states.get(batch_id)
    producer.run()
    results = producer.results(batch_id)
    assert len(results) == 4
    with pytest.raises(FileNotFoundError):
        run_step(producer.tools, state, step)
    assert producer.results(batch_id) == results
    assert sorted(path.name for path in producer.store.folder(batch_id).path.iterdir()) == [
        "results"
    ]


@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_a_lost_step_is_found_whatever_the_clock_does(producer, monkeypatch, jump_s):
    batch_id = producer.submit(lines(3))
    producer.queue.clear()
    monkeypatch.setattr("producer.bulk.steward.now_ms", lambda: now_ms() + jump_s * 1000)
    producer.steward.advance(batch_id)
    assert producer.queue == [(batch_id, Step("read", 0))]


def test_a_step_that_the_queue_did_not_take_goes_at_the_next_look(producer):
    def queue(*entry):
        taken.append(entry)
        if len(taken) == 1:
            raise OSError("the task queue does not answer")

    taken = []
    batch_id = producer.submit(lines(3))
    producer.client.hset(batch_key(batch_id), mapping={"step": "", "step_ms": 0})
    steward = Steward(producer.states, producer.client, queue)
    with pytest.raises(OSError, match="task queue"):
        steward.advance(batch_id)
    steward.advance(batch_id)
    steward.advance(batch_id)
    assert taken == [(batch_id, Step("read", 0))] * 2


def test_a_step_is_begun_though_the_answer_was_lost(producer, monkeypatch):
    """redis-py then sends the same once more."""
    batch_id = producer.submit(lines(3))
    state = producer.states.get(batch_id)
    monkeypatch.setattr("producer.bulk.state.now_ms", lambda: state.step_ms + 5)
    assert producer.states.begin(state, Step("read", 1))
    assert producer.states.begin(state, Step("read", 1))
    assert not producer.states.begin(state, Step("read", 2))
    monkeypatch.setattr("producer.bulk.state.now_ms", lambda: state.step_ms + 6)
    assert not producer.states.begin(state, Step("read", 1))


def test_repeated_custom_ids_are_found_across_pieces(producer, monkeypatch):
    monkeypatch.setattr("producer.bulk.reading.CHUNK_LINES", 10)
    names = ["x", *map(str, range(30)), "x", "y", "x", "7", "y"]
    batch_id = producer.submit(
        b"".join(b'{"prompt":"p","custom_id":"%b"}\n' % name.encode() for name in names)
    )
    producer.run()
    sent = [line for _, message in producer.sender.bundles for line in message.lines]
    assert len(sent) == 32
    told = {error.line: error.message for error in producer.states.errors(batch_id)}
    assert {line: int(words.split("line ")[1].split()[0]) for line, words in told.items()} == {
        32: 1,
        34: 1,
        35: 9,
        36: 33,
    }


def test_only_what_is_missing_is_published_again(producer):
    batch_id = producer.submit(lines(100))
    producer.run()
    sent = list(producer.sender.bundles)
    producer.answer(batch_id, sent[:1])
    state = producer.states.get(batch_id)
    assert producer.states.change(state, {"again": 0})
    producer.steward.advance(batch_id)
    producer.run()
    again = producer.sender.bundles[len(sent) :]
    assert again == sent[1:]
    assert producer.states.get(batch_id).again == -1
    assert producer.states.get(batch_id).published == 100


@pytest.mark.parametrize("kind", ["read", "plan", "publish", "close", "assemble", "finish"])
def test_a_step_nobody_waits_for_is_not_done(producer, kind: StepKind):
    batch_id = producer.submit(lines(1))
    assert do_step(producer.tools, producer.steward, batch_id, Step(kind, 7)) == "done before"
    assert do_step(producer.tools, producer.steward, "batch_x", Step(kind, 0)) == "done before"


def test_no_more_batches_than_the_limit_are_made_at_once(producer):
    record = producer.states.get(producer.submit(lines(1))).record
    more = [msgspec.structs.replace(record, id=f"batch_{n}") for n in range(64)]
    with ThreadPoolExecutor(16) as threads:
        made = list(threads.map(lambda one: producer.states.create(one, 8), more))
    assert sum(made) == 7
    assert len(producer.states.open_ids()) == 8
    assert producer.states.create(record, 8)  # its answer was lost, and it is asked again


def test_pages(producer):
    ids = [producer.submit(lines(1)) for _ in range(5)]
    page, more = producer.states.page("t", 2, None)
    assert more
    seen = [state.id for state in page]
    while more:
        page, more = producer.states.page("t", 2, seen[-1])
        seen += [state.id for state in page]
    assert sorted(seen) == sorted(ids)
    assert producer.states.page("nobody", 2, None) == ([], False)


def test_pending_lines_are_told_from_lost_ones(producer):
    log = JobLog(producer.client)
    assert not nothing_pending(heartbeats(producer.client))  # nobody lives to say so

    def seen(*offsets):
        statuses = tuple(
            PartitionStatus("openlora.batch", n, committed, high, high)
            for n, (committed, high) in enumerate(offsets)
        )
        log.write_heartbeat(a_heartbeat("w", ready=True, partitions=statuses))
        return nothing_pending(heartbeats(producer.client))

    assert seen((5, 5), (0, 0))
    assert not seen((5, 5), (4, 5))
    assert not seen((5, 5), (0, -1))
