"""The scripted engine says what it should, when it should."""

from __future__ import annotations

import time

import pytest

from openlora.engine.request import Request
from openlora.sampling_params import SamplingParams
from workers.scripted_engine import (
    CLOCK_TICK_NS,
    CLOCK_TICKS,
    ScriptedEngine,
    clock_age_ms,
    clock_token,
)


def request(prompt=(1, 2, 3), output=(), max_tokens=4):
    return Request(
        prompt_token_ids=prompt,
        output_token_ids=output,
        params=SamplingParams(max_tokens=max_tokens),
    )


def drain(engine):
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    return outputs


def test_a_resumed_request_goes_on_as_it_would_have():
    engine = ScriptedEngine()
    engine.add(request(max_tokens=6))
    whole = [output.token_id for output in drain(engine)]
    engine.add(request(output=whole[:2], max_tokens=6))
    rest = drain(engine)
    assert [output.token_id for output in rest] == whole[2:]
    assert [output.index for output in rest] == [2, 3, 4, 5]
    assert [output.finish_reason for output in rest] == [None, None, None, "length"]


def test_requests_run_together_and_abort_ends_one():
    engine = ScriptedEngine()
    kept, aborted = engine.add(request()), engine.add(request(prompt=(9,)))
    assert {output.request_id for output in engine.step()} == {kept, aborted}
    engine.abort(aborted)
    assert {output.request_id for output in drain(engine)} == {kept}
    assert engine.stats().running == 0


def test_steps_keep_their_pace():
    engine = ScriptedEngine(steps_per_s=200)
    engine.add(request(max_tokens=21))
    started = time.monotonic()
    drain(engine)
    assert time.monotonic() - started >= 20 / 200


@pytest.mark.parametrize("age_ms", [0.0, 0.1, 12.5, 3000.0])
def test_clock_tokens_say_their_age_across_the_wrap(age_ms):
    for now in (0, CLOCK_TICKS * CLOCK_TICK_NS - 1, 123_456_789_012_345):
        assert clock_age_ms(clock_token(now), now + int(age_ms * 1e6)) == pytest.approx(
            age_ms, abs=0.11
        )
