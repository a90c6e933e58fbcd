"""What is left of a batch in Redis when it is over, and for how long."""

from __future__ import annotations

import argparse
import time

import pytest

from openlora.errors import SetupError
from producer.bulk.config import add_arguments, config_from
from producer.bulk.keys import batch_key, errors_key, progress_key, tenant_key
from producer.bulk.records import result_file_id
from producer.bulk.state import KEEP_OVER_S, Mark
from tests.producer.bulk.stepwise import lines

pytestmark = pytest.mark.services


def keys_of(batch_id):
    return [key(batch_id) for key in (batch_key, errors_key, progress_key)]


def finish(producer, batch_id):
    """Two lines run, one refused: every kind of key is there at the end."""
    producer.run()
    producer.answer(batch_id, producer.sender.bundles)
    producer.sender.bundles.clear()
    producer.steward.advance(batch_id)
    producer.run()
    assert producer.states.get(batch_id).phase == "over"
    assert producer.client.exists(*keys_of(batch_id)) == 3


def test_what_is_left_of_a_batch_expires(producer):
    batch_id = producer.submit(lines(2) + b"nonsense\n")
    assert {producer.client.ttl(key) for key in keys_of(batch_id)} <= {-1, -2}
    finish(producer, batch_id)
    for key in keys_of(batch_id):
        assert 0 < producer.client.ttl(key) <= KEEP_OVER_S
    assert len(producer.results(batch_id)) == 3
    left = [key for key in producer.client.keys(f"*{batch_id}*") if producer.client.ttl(key) == -1]
    assert left == []


def test_a_batch_that_expired_is_forgotten_and_its_files_are_not(producer):
    producer.states._keep_over_s = 1
    old = producer.submit(lines(2) + b"nonsense\n")
    finish(producer, old)
    answers = producer.store.get(result_file_id(old, "answers"), "t")
    while producer.states.get(old) is not None:
        time.sleep(0.05)
    assert producer.states.page("t", 10, None) == ([], False)
    assert not producer.states.end(old, "cancelled")
    assert producer.states.mark(old, [Mark(1)], source="worker", adapter="a") == -1
    assert len(b"".join(producer.store.content(answers)).splitlines()) == 2
    newer = producer.submit(lines(2) + b"nonsense\n")
    assert producer.client.zcard(tenant_key("t")) == 2
    finish(producer, newer)
    assert producer.client.zrange(tenant_key("t"), 0, -1) == [newer.encode()]
    assert producer.client.exists(*keys_of(old)) == 0


def test_the_operator_says_how_long():
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def kept(*argv, **environ):
        return config_from(parser.parse_args(argv), environ).keep_batches_s

    assert kept() == KEEP_OVER_S
    assert kept(OPENLORA_KEEP_BATCHES_S="60") == 60
    assert kept("--keep-batches-s", "70", OPENLORA_KEEP_BATCHES_S="60") == 70
    with pytest.raises(SetupError, match="keep-batches-s is '0'"):
        kept(OPENLORA_KEEP_BATCHES_S="0")
