"""``JobLog``: order of answers over shards, lost scripts, heartbeats, cancels, an absent server."""

from __future__ import annotations

import pytest

from openlora.errors import Overloaded
from openlora.joblog import JobLog, core, redis_client
from openlora.local import ServerProcess
from openlora.protocol import names
from openlora.protocol.status import Heartbeat
from tests.joblog.jobs import a_chunk, a_job
from tests.redis_moments import keep

pytestmark = pytest.mark.services


@pytest.fixture
def log(redis_url: str) -> JobLog:
    return JobLog(redis_client(redis_url))


def _store(log: JobLog, *jobs) -> list[str]:
    log._run([core.store_call(job, 60_000) for job in jobs])
    return [job.job_id for job in jobs]


def a_heartbeat(worker_id: str, **fields) -> Heartbeat:
    facts = {"pid": 1, "engine_pid": 2, "host": "h", "device": "cpu", "dtype": "float32"}
    facts |= {"model": "m", "model_id": "m", "max_model_len": 8, "ready": True}
    return Heartbeat(id=worker_id, **(facts | {"started_ms": 1, "written_ms": 2} | fields))


def test_answers_come_in_the_order_of_the_chunks_whatever_their_shard(log: JobLog) -> None:
    job_ids = _store(log, *(a_job(shard) for shard in (1, 255, 1, 0, 255)))
    missing = a_job(1).job_id
    claims = log.claim([*job_ids, missing], "w")
    assert [claim.status for claim in claims] == ["claimed"] * 5 + ["missing"]
    chunks = [
        a_chunk(job_id, claim.epoch, 0, count)
        for count, (job_id, claim) in enumerate(zip(job_ids, claims, strict=False), 1)
    ]
    chunks.insert(2, a_chunk(missing, 1, 0))
    chunks.append(a_chunk(job_ids[0], claims[0].epoch - 1, 1))
    results = log.append(chunks)
    taken = [(result.status, result.length) for result in results]
    assert taken == [
        *(("taken", 1), ("taken", 2), ("gone", 0), ("taken", 3), ("taken", 4), ("taken", 5)),
        ("fenced", 1),
    ]


def test_nothing_to_do_asks_nothing(log: JobLog) -> None:
    assert log.claim([], "w") == []
    assert log.append([]) == []
    log.retire([])


def test_a_retired_log_stays_as_long_as_it_is_told(log: JobLog) -> None:
    keeps_short = JobLog(log._redis, keep_ended_s=7)
    (job_id,) = _store(log, a_job())
    epoch = log.claim([job_id], "w")[0].epoch
    log.append([a_chunk(job_id, epoch, 0, end=True)])
    keeps_short.retire([job_id])
    assert 0 < log._redis.ttl(names.job_key(job_id)) <= 7


def test_scripts_are_loaded_again_when_the_server_lost_them(log: JobLog) -> None:
    (job_id,) = _store(log, a_job())
    epoch = log.claim([job_id], "w")[0].epoch
    log._redis.script_flush()
    assert log.append([a_chunk(job_id, epoch, 0)])[0].status == "taken"
    log._redis.script_flush()
    assert log.claim([job_id], "w")[0].before == epoch


def test_work_goes_on_over_a_restart(fresh_redis: ServerProcess) -> None:
    log = JobLog(redis_client(fresh_redis.address))
    (job_id,) = _store(log, a_job())
    epoch = log.claim([job_id], "w")[0].epoch
    first = a_chunk(job_id, epoch, 0)
    assert log.append([first])[0].status == "taken"
    keep(fresh_redis)
    fresh_redis.kill()
    with pytest.raises(Overloaded, match=rf"Redis at 127\.0\.0\.1:{fresh_redis.spec.port} does"):
        log.append([a_chunk(job_id, epoch, 1)])
    fresh_redis.start()
    assert log.append([first])[0].length == 1  # the repeat of what it had
    assert log.claim([job_id], "w")[0].chunks == (first,)


@pytest.mark.parametrize("kept", ["nothing", "the job", "the claim"])
def test_what_a_crash_of_redis_took_with_it_is_put_back(
    fresh_redis: ServerProcess, kept: str
) -> None:
    log = JobLog(redis_client(fresh_redis.address))
    job = a_job()
    moment = keep(fresh_redis)
    _store(log, job)
    if kept != "nothing":
        moment = keep(fresh_redis)
    epoch = log.claim([job.job_id], "w")[0].epoch
    if kept == "the claim":
        moment = keep(fresh_redis)
    first = a_chunk(job.job_id, epoch, 0)
    assert log.append([first])[0].status == "taken"
    fresh_redis.kill()
    moment.fall_back()
    fresh_redis.start()
    said = {"nothing": "gone", "the job": "unclaimed", "the claim": "gap"}[kept]
    second = a_chunk(job.job_id, epoch, 1)
    assert log.append([second])[0].status == said
    restored = log.restore(job, epoch, "w")
    assert (restored.status, restored.epoch, restored.chunks) == ("claimed", epoch, ())
    assert [r.status for r in log.append([first, second])] == ["taken", "taken"]


def test_a_claim_after_a_crash_of_redis_fences_one_that_it_lost(
    fresh_redis: ServerProcess,
) -> None:
    log = JobLog(redis_client(fresh_redis.address))
    job = a_job()
    _store(log, job)
    moment = keep(fresh_redis)
    lost = log.claim([job.job_id], "w")[0].epoch
    fresh_redis.kill()
    moment.fall_back()
    fresh_redis.start()
    newer = log.claim([job.job_id], "another")[0].epoch
    assert newer > lost
    assert log.append([a_chunk(job.job_id, lost, 0)])[0].status == "fenced"
    assert log.restore(job, lost, "w").status == "fenced"


def test_an_epoch_of_many_zeros_names_one_log(log: JobLog) -> None:
    """Lua writes large round numbers in more than one way."""
    job = a_job()
    _store(log, job)
    epoch = 4_000_000_000_000  # a claim behind it has the next one, until the year 2096
    assert log.restore(job, epoch, "w").epoch == epoch
    assert log.append([a_chunk(job.job_id, epoch, 0)])[0].status == "taken"
    assert log.extend([([a_chunk(job.job_id, epoch, 1)], [1])]) == [{}]
    claim = log.claim([job.job_id], "another")[0]
    assert (claim.before, claim.epoch, len(claim.chunks)) == (epoch, epoch + 1, 2)


def test_heartbeats_show_for_a_few_seconds_and_go_when_removed(log: JobLog) -> None:
    log.write_heartbeat(a_heartbeat("w1"))
    assert 0 < log._redis.ttl(names.worker_key("w1")) <= core.HEARTBEAT_TTL_S
    assert log._redis.smembers(names.WORKERS_KEY) == {b"w1"}
    log.remove_heartbeat("w1")
    assert log._redis.exists(names.WORKERS_KEY, names.worker_key("w1")) == 0


def test_a_heartbeat_of_another_version_hides_no_other(log: JobLog) -> None:
    log.write_heartbeat(a_heartbeat("old"))
    log.write_heartbeat(a_heartbeat("w"))
    log._redis.set(names.worker_key("old"), b'{"id":"old","a":1}')
    assert [heartbeat.id for heartbeat in log.heartbeats()] == ["w"]
