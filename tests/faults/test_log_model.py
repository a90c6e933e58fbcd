"""The model of the log does what the real scripts do, whatever is asked of them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openlora.joblog import JobLog, core, redis_client
from openlora.protocol.events import Chunk as WireChunk
from openlora.protocol.events import End, Token
from openlora.protocol.names import job_key
from tests.faults.log_model import Chunk, LogModel
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
    st.tuples(st.just("recreate")),
    st.tuples(st.just("restore"), st.integers(0, 4)),
    st.tuples(st.just("disown"), st.booleans()),
    st.tuples(st.just("lose")),
)


def wait_for_clock(client, epoch):
    """A crash takes longer than that: claims in one millisecond have epochs ahead of the clock."""
    seconds, micros = client.time()
    while seconds * 1000 + micros // 1000 <= epoch:
        seconds, micros = client.time()


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
        epochs = [9, 0]  # one that no claim had, and those of all claims

        def check(claim, said):
            assert claim.status == said
            if said == "claimed":
                assert claim.epoch == model.epoch
                assert sum(len(chunk.tokens) for chunk in claim.chunks) == model.length
                epochs.append(claim.epoch)

        for step in sequence:
            if step[0] == "claim":
                claim = log.claim([job.job_id], "w")[0]
                assert claim.status != "claimed" or claim.epoch not in epochs
                model, said = model.claim(claim.epoch, "w")
                check(claim, said)
            elif step[0] == "recreate":
                claim = log.recreate(job, "w")
                assert claim.status != "claimed" or claim.epoch not in epochs
                model, said = model.recreate(claim.epoch, "w")
                check(claim, said)
            elif step[0] == "restore":
                epoch = epochs[step[1] % len(epochs)]
                claim = log.restore(job, epoch, "w")
                model, said = model.restore(epoch, "w")
                check(claim, said)
            elif step[0] == "disown":
                by = "w" if step[1] else "v"
                newest = log.disown([job.job_id], by)[0]
                assert not newest.disowned or newest.epoch not in epochs
                after, said = model.disown(newest.epoch, by)
                assert (newest.epoch, newest.disowned) == (said or 0, after != model)
                model = after
                epochs += [newest.epoch] * newest.disowned
            elif step[0] == "lose":
                model = LogModel(epoch=None)
                wait_for_clock(client, max(epochs))
                for key in client.keys(f"{job_key(job.job_id)}*"):
                    client.delete(key)
            else:
                _, which, first, count, is_end, is_restart = step
                epoch = epochs[which % len(epochs)]
                # an end is told apart from a restart by the log, and a chunk is one of them
                chunk = Chunk(epoch, first, (0,) * (first + count), is_end, is_restart > is_end)
                model, said = model.append(chunk)
                tokens = tuple(Token(first + n, "x") for n in range(count))
                end = End("stop") if is_end else None
                real = WireChunk(job.job_id, epoch, first, tokens, end, chunk.restarted)
                result = log.append([real])[0]
                assert result.status == said, (step, model)
                if said != "gone":
                    assert result.length == model.length
