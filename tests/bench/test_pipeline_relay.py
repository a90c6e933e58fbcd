"""The bare relay's messages say the time of their step, whatever the step."""

from __future__ import annotations

import json

from openlora.bench.pipeline_relay import at_time, step_message
from workers.scripted_engine import clock_token


def test_a_message_holds_every_streams_frame_with_the_time_as_token():
    now_ns = 123_456_789_000
    frames = json.loads(at_time(step_message(3, 7), now_ns))
    assert [number for number, _ in frames] == [0, 1, 2]
    for number, text in frames:
        frame = json.loads(text)
        assert (frame["index"], frame["token_id"]) == (7, clock_token(now_ns))
        assert frame["text"] == f" w{20000 + number}"
