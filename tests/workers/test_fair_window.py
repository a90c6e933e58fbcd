"""A flood at a real engine process: whoever else asks gets the next seats."""

from __future__ import annotations

import pytest

from openlora.sampling_params import SamplingParams
from tests.integration.up_system import write_model
from tests.workers.test_engine_client import outputs_until, setup
from workers.engine_client import EngineClient
from workers.messages import Start

pytestmark = pytest.mark.services

FLOOD = 400
MARK = FLOOD + 4
PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def start(ticket, tenant):
    return Start(ticket, (5, 6, 7), PARAMS, tenant=tenant)


def test_a_tenant_that_comes_behind_another_s_flood_is_served_at_once(tmp_path):
    client = EngineClient(setup(kind="model", model=str(write_model(tmp_path / "model"))))
    try:
        seats = client.wait_ready().max_num_seqs
        assert 4 * seats < FLOOD
        for ticket in range(FLOOD):
            client.start(start(ticket, "greedy"))
        outputs_until(client, lambda seen: len(seen) > seats, timeout_s=60)
        modest = range(FLOOD, FLOOD + 4)
        for ticket in modest:
            client.start(start(ticket, "modest"))
        # With them in one frame, and answered when the engine takes it.
        client.start(Start(MARK, (5, 6, 7), PARAMS, (("nobody", 1.0),)))

        def is_over(seen):
            return {o.ticket for o in seen if o.finish_reason} >= set(modest)

        outputs, _ = outputs_until(client, is_over, timeout_s=60)
    finally:
        client.stop()
    tickets = [output.ticket for output in outputs]
    # Those who had seats finish, and some of those who took the seats between them.
    assert len({*tickets[tickets.index(MARK) :]}) <= 3 * seats
