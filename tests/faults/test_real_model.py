"""A real model in fp32: after a failover the text is the very one of the undisturbed run."""

from __future__ import annotations

import pytest

from openlora.bench import chaos_faults as faults
from openlora.bench.chaos_system import ChaosPlan
from tests.faults.test_failover import EMBEDDED_FAILOVER_S, check
from tests.integration.up_system import write_model

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(400)]

STREAMS = 24
LOAD_S = 15.0
"""Of torch and the tiny model, beside other work."""


@pytest.fixture(scope="module")
def model_storm(make_storm, tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    return make_storm(ChaosPlan(engine="model", model=model), streams=STREAMS, tokens=400)


@pytest.mark.parametrize("fault", [faults.kill_engine, faults.kill_whole_worker])
def test_greedy_and_seeded_texts_are_those_of_the_undisturbed_run(model_storm, fault):
    row = model_storm.strike(fault.__name__, fault, STREAMS)
    check(row, hit=row.hit, stall_s=EMBEDDED_FAILOVER_S + LOAD_S)
    assert row.hit > STREAMS / 2
    assert row.restarted == 0
