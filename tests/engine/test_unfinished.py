"""Each request ends once: its adapters are dropped, its place is free, its last output says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from openlora.engine.kv_blocks import BlockManager
from openlora.engine.scheduler import Scheduler
from openlora.engine.sequence import Status
from openlora.engine.step import SampledToken
from openlora.engine.unfinished import UnfinishedRequests
from openlora.errors import AdapterFailed
from tests.engine.sequences import make_sequence

EOS = 2


class Adapters:
    """Remembers who dropped theirs."""

    room_epoch = 0

    def __init__(self):
        self.dropped = []

    def drop(self, sequence_id, adapters):
        self.dropped.append(sequence_id)

    def release(self, sequence):
        pass


@pytest.fixture
def bench():
    adapters = Adapters()
    blocks = BlockManager(8, 4, root="m", enable_prefix_caching=True)
    scheduler = Scheduler(blocks, adapters, max_num_seqs=4, max_num_batched_tokens=16)
    model = SimpleNamespace(eos_token_ids=(EOS,), dtype="float16")
    return SimpleNamespace(
        adapters=adapters,
        scheduler=scheduler,
        requests=UnfinishedRequests(scheduler, adapters, model),
    )


def start(bench, sequence_id=1, **settings):
    sequence = make_sequence(sequence_id, [5, 6], **settings)
    bench.requests.add(sequence)
    bench.scheduler.schedule(1)
    return sequence


def test_tokens_come_out_until_the_last_one_ends_the_request(bench):
    sequence = start(bench, max_tokens=2)
    bench.requests.take(sequence, SampledToken(7))
    assert bench.requests.has_outputs
    bench.requests.take(sequence, SampledToken(8, -0.5))
    first, last = bench.requests.drain()
    assert (first.index, first.token_id, first.finish_reason) == (0, 7, None)
    assert (last.index, last.token_id, last.logprob, last.finish_reason) == (1, 8, -0.5, "length")
    assert sequence.status is Status.FINISHED
    assert bench.adapters.dropped == [1]
    assert bench.requests.get(1) is None
    assert not bench.requests
    assert bench.requests.num_output_tokens == 2


def test_eos_ends_it(bench):
    sequence = start(bench)
    bench.requests.take(sequence, SampledToken(EOS))
    assert [output.finish_reason for output in bench.requests.drain()] == ["stop"]


def test_a_token_that_is_none_fails_it_and_names_the_dtype(bench):
    sequence = start(bench, adapters=())
    bench.requests.take(sequence, SampledToken(-1))
    (output,) = bench.requests.drain()
    assert output.token_id is None
    assert output.error.code == "internal"
    assert "base model's weights overflow in float16; try bfloat16" in output.error.message
    bench.scheduler.check_integrity()


def test_fail_and_drop_leave_the_others(bench):
    one, two, three = (start(bench, i) for i in (1, 2, 3))
    bench.requests.fail(one, AdapterFailed("broken"))
    bench.requests.drop(two)
    (output,) = bench.requests.drain()
    assert (output.request_id, output.error.code) == (1, "adapter_failed")
    assert bench.adapters.dropped == [1, 2]
    assert bench.scheduler.running == [three]
    bench.requests.put_back([output])
    assert bench.requests.drain() == [output]
    assert bench.requests


def test_one_resumed_after_its_last_token_ends_at_once(bench):
    sequence = make_sequence(4, [5, 6, EOS])
    sequence.num_prompt_tokens = 2
    bench.requests.add(sequence)
    (output,) = bench.requests.drain()
    assert (output.index, output.token_id, output.finish_reason) == (1, None, "stop")
    assert bench.scheduler.num_waiting == 0
