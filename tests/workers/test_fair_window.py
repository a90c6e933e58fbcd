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


def start(ticket, tenant):
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    return Start(ticket, (5, 6, 7), params, tenant=tenant)


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

        def is_over(seen):
            return {o.ticket for o in seen if o.finish_reason} >= set(modest)

        outputs, _ = outputs_until(client, is_over, timeout_s=60)
    finally:
        client.stop()
    # Those who had seats finish, and some of those who took the seats between them.
    assert len({output.ticket for output in outputs}) <= 3 * seats
