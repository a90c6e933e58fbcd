"""Batches that are cancelled or expire before all their lines are read or run."""

from __future__ import annotations

import json

import msgspec
import pytest

from openlora.errors import Overloaded
from openlora.protocol.codec import encode
from producer.bulk.keys import batch_key
from producer.bulk.records import Step
from producer.bulk.state import now_ms
from producer.bulk.steps import run_step
from tests.producer.bulk.stepwise import lines

pytestmark = pytest.mark.services


@pytest.mark.parametrize(
    ("ending", "code"), [("cancelled", "batch_cancelled"), ("expired", "deadline_exceeded")]
)
def test_an_end_does_not_wait_for_a_worker_to_read_the_rest(producer, ending, code, monkeypatch):
    """Lines that name a model wait for one; what was read before keeps what it has."""
    monkeypatch.setattr("producer.bulk.reading.CHUNK_LINES", 40)
    body = {"model": "tiny", "prompt": "p"}
    line = {"custom_id": "z", "method": "POST", "url": "/v1/completions", "body": body}
    data = b"nonsense\n" + lines(39) + b"".join([json.dumps(line).encode() + b"\n"] * 60)
    batch_id = producer.submit(data)
    with pytest.raises(Overloaded, match="line 41 names a model and no worker"):
        producer.run()
    if ending == "cancelled":
        producer.states.end(batch_id, "cancelled")
    else:
        state = producer.states.get(batch_id)
        late = msgspec.structs.replace(state.record, expires_ms=now_ms() - 1)
        producer.client.hset(batch_key(batch_id), "record", encode(late))
    producer.steward.advance(batch_id)
    producer.run()
    state = producer.states.get(batch_id)
    assert (state.status, state.total, state.done, state.failed) == (ending, 100, 100, 100)
    results = producer.results(batch_id)
    assert [r["error"]["code"] for r in results] == ["invalid_request"] + [code] * 99
    assert results[60]["custom_id"] == "z"
    assert results[60]["response"] is None  # in its own form


def test_an_end_does_not_wait_for_a_broker(producer):
    batch_id = producer.submit(lines(3))
    producer.sender.is_away = True
    with pytest.raises(Overloaded, match="no broker"):
        producer.run()
    producer.states.end(batch_id, "cancelled")
    producer.steward.advance(batch_id)
    producer.run()
    assert producer.states.get(batch_id).status == "cancelled"
    assert len(producer.results(batch_id)) == 3


@pytest.mark.parametrize("first", ["the reading", "the end"])
def test_a_piece_that_is_read_while_the_batch_ends_has_each_line_once(producer, first):
    """The reading began before the end; either may be done first, and either may count."""
    batch_id = producer.submit(lines(10) + b"nonsense\n")
    producer.queue.clear()
    before = producer.states.get(batch_id)
    producer.states.end(batch_id, "cancelled")
    step = Step("read", 0)
    after = producer.states.get(batch_id)
    assert producer.states.begin(after, step)
    runs = [before, after] if first == "the reading" else [after, before]
    fields = [run_step(producer.tools, state, step) for state in runs]
    assert producer.states.finish(batch_id, step, fields[0])
    assert not producer.states.finish(batch_id, step, fields[1])
    producer.steward.advance(batch_id)
    producer.run()
    state = producer.states.get(batch_id)
    assert (state.status, state.total, state.failed) == ("cancelled", 11, 11)
    assert [r["line"] for r in producer.results(batch_id)] == list(range(1, 12))
