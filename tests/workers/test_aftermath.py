"""Which ends of an engine are held against its jobs."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from openlora.joblog import redis_client
from openlora.joblog.crashes import CrashLog
from workers.aftermath import Aftermath, how_it_died, is_crash


@pytest.mark.parametrize(
    "status",
    [None, 0, *(-s for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))],
)
def test_signals_from_outside_and_orderly_ends_are_nobodys_fault(status):
    assert not is_crash(status)


@pytest.mark.parametrize(
    ("status", "how"),
    [(1, "status 1"), (-signal.SIGSEGV, "SIGSEGV"), (-signal.SIGABRT, "SIGABRT")],
)
def test_crashes_are_somebodys(status, how):
    assert is_crash(status)
    assert how_it_died(status) == how


@pytest.mark.services
def test_an_engine_without_a_job_accuses_the_pin_that_it_was_loading(redis_url):
    with redis_client(redis_url) as client:
        config = SimpleNamespace(worker_id="w", quarantine_s=60)
        parts = SimpleNamespace(
            config=config, loop=SimpleNamespace(runs_in_engine=list, bulk_lines_in_engine=0)
        )
        for _ in range(2):
            assert CrashLog(client).quarantined(["a" * 64]) == {}
            Aftermath(parts, client)._accuse(-11, ["a" * 64])
        (reason,) = CrashLog(client).quarantined(["a" * 64]).values()
        assert "SIGSEGV" in reason
