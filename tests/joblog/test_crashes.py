"""What is held against jobs and adapters, in a real Redis."""

from __future__ import annotations

import time

import pytest

from openlora.joblog import JobLog, core, redis_client
from openlora.joblog.crashes import ADAPTER_LIMIT, QUARANTINE_TTL_S, CrashLog, Suspicion
from openlora.protocol import names
from openlora.protocol.crashes import Crash
from tests.joblog.jobs import a_chunk, a_job

pytestmark = pytest.mark.services

ALONE = Crash(1, "w", "SIGSEGV", 1)
AMONG = Crash(2, "w", "status 1", 5)


@pytest.fixture
def client(redis_url):
    with redis_client(redis_url) as client:
        yield client


def store(client, job):
    call = core.store_call(job, 60_000)
    client.eval(call.script.source, len(call.keys), *call.keys, *call.args)
    return job.job_id


def test_crashes_add_up_and_a_record_that_is_sent_again_does_not_count_twice(client):
    log = CrashLog(client)
    ids = [store(client, a_job()), store(client, a_job())]
    assert log.suspicions(ids) == [Suspicion(), Suspicion()]
    assert log.crashed(ids, AMONG) == [Suspicion(1, 0, (AMONG,))] * 2
    for _ in range(2):
        assert log.crashed(ids[:1], ALONE) == [Suspicion(2, 1, (AMONG, ALONE))]
    assert not log.suspicions(ids)[0].is_deadly
    again = Crash(3, "v", "SIGABRT", 1)
    assert log.crashed(ids[:1], again)[0].is_deadly
    assert log.suspicions(ids) == [
        Suspicion(3, 2, (AMONG, ALONE, again)),
        Suspicion(1, 0, (AMONG,)),
    ]
    log.acquit(ids[0])
    assert log.suspicions(ids)[0] == Suspicion()


def test_nothing_is_held_against_a_job_that_ended_or_is_unknown(client):
    log = CrashLog(client)
    job_id = store(client, a_job())
    jobs = JobLog(client)
    epoch = jobs.claim([job_id], "w")[0].epoch
    jobs.append([a_chunk(job_id, epoch, 0, 1, end=True)])
    assert log.crashed([job_id, "00" * 13], ALONE) == [Suspicion(), Suspicion()]
    assert log.suspicions([]) == []


def test_an_adapter_is_quarantined_for_different_jobs_not_for_one(client):
    log = CrashLog(client)
    assert ADAPTER_LIMIT == 2
    assert not log.adapter_died("ab", "job 1", "why")
    assert not log.adapter_died("ab", "job 1", "why")
    assert log.quarantined(["ab", "cd"]) == {}
    assert log.adapter_died("ab", "job 2", "why")
    assert log.quarantined(["cd", "ab"]) == {"ab": "why"}
    assert log.quarantined([]) == {}
    assert 0 < client.ttl(names.quarantine_key("ab")) <= QUARANTINE_TTL_S
    log.release("ab")
    assert log.quarantined(["ab"]) == {}
    assert not log.adapter_died("ab", "job 3", "why")


def test_lines_of_a_batch_are_suspected_by_number(client):
    log = CrashLog(client)
    assert log.lines_suspected("batch_x", [1, 2]) == {}
    assert log.lines_crashed("batch_x", [], AMONG) == {}
    for _ in range(2):  # sent again after a lost reply
        assert set(log.lines_crashed("batch_x", [1, 2], AMONG)) == {1, 2}
    assert log.lines_crashed("batch_x", [2], ALONE) == {2: Suspicion(2, 1, (AMONG, ALONE))}
    assert log.lines_suspected("batch_x", [1, 2, 3]) == {
        1: Suspicion(1, 0, (AMONG,)),
        2: Suspicion(2, 1, (AMONG, ALONE)),
    }
    assert log.lines_crashed("batch_x", [2], Crash(4, "w", "SIGABRT", 1))[2].is_deadly
    assert client.ttl(names.line_crashes_key("batch_x")) > 0


def test_a_quarantine_is_over_when_the_operator_said(client):
    log = CrashLog(client, quarantine_s=1)
    for job_id in ("job 1", "job 2"):
        log.adapter_died("ab", job_id, "why")
    assert log.quarantined(["ab"]) == {"ab": "why"}
    while log.quarantined(["ab"]):
        time.sleep(0.05)
