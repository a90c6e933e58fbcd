"""The model of the log does what the real scripts do, whatever is asked of them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlora.joblog import JobLog, core, redis_client
from openlora.protocol.events import Chunk, End, Token
from openlora.protocol.names import job_key
from tests.faults.log_model import LogModel
from tests.joblog.jobs import a_job

pytestmark = pytest.mark.services

appends = st.tuples(
    st.just("append"),
    st.integers(0, 4),
    st.integers(0, 5),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)
steps = st.one_of(
    appends,
    appends,
    st.tuples(st.just("claim")),
    st.tuples(st.just("recreate"), st.integers(0, 3)),
    st.tuples(st.just("lose")),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(steps, max_size=14))
def test_model_and_scripts_answer_alike(redis_url, sequence):
    with redis_client(redis_url) as client:
        log = JobLog(client)
        job = a_job()
        call = core.store_call(job, 60_000)
        client.eval(call.script.source, len(call.keys), *call.keys, *call.args)
        model = LogModel()
        for step in sequence:
            if step[0] == "claim":
                model, said = model.claim()
                claim = log.claim([job.job_id], "w")[0]
                assert claim.status == said
                if said == "claimed":
                    assert claim.epoch == model.epoch
                    assert sum(len(chunk.tokens) for chunk in claim.chunks) == model.length
            elif step[0] == "recreate":
                model, said = model.recreate(step[1])
                claim = log.recreate(job, step[1], "w")
                assert (claim.status, said == "claimed" and claim.epoch) == (
                    said,
                    said == "claimed" and model.epoch,
                )
            elif step[0] == "lose":
                model = LogModel(epoch=None)
                for key in client.keys(f"{job_key(job.job_id)}*"):
                    client.delete(key)
            else:
                _, epoch, first, count, is_end, is_restart = step
                # an end is told apart from a restart by the log, and a chunk is one of them
                chunk = (epoch, first, count, is_end, is_restart and not is_end)
                model, said = model.append(chunk)
                tokens = tuple(Token(first + n, "x") for n in range(count))
                real = Chunk(
                    job.job_id, epoch, first, tokens, End("stop") if is_end else None, chunk[4]
                )
                result = log.append([real])[0]
                assert result.status == said, (step, model)
                if said not in ("gone",):
                    assert result.length == model.length
