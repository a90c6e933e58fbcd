"""Celery's own tools see a producer as any Celery worker."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, get_args

import pytest

from producer.bulk.app import QUEUE, make_app, task_name
from producer.bulk.records import StepKind
from tests.producer.bulk.running import BulkSystem

pytestmark = pytest.mark.services

TIMEOUT_S = 15
"""Asked for one answer, Celery waits for no more than that."""


@pytest.fixture
def name(bulk: BulkSystem) -> str:
    """The producer's, as Celery knows it."""
    inspect = make_app(bulk.system.redis_url).control.inspect(timeout=1, limit=1)
    deadline = time.monotonic() + TIMEOUT_S
    while not (answers := inspect.ping()):  # what is sent before it listens is lost
        assert time.monotonic() < deadline
    [name] = answers
    assert name.startswith("producer@")
    return str(name)


def celery(bulk: BulkSystem, name: str, *words: str) -> Any:
    """What the ``celery`` command says of the producer, told nothing but the broker."""
    argv = [sys.executable, "-m", "celery", "-b", bulk.system.redis_url, *words]
    argv += ["--destination", name, "--timeout", str(TIMEOUT_S), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    return json.loads(done.stdout)


def test_inspect_ping_and_active(bulk: BulkSystem, name: str) -> None:
    assert celery(bulk, name, "inspect", "ping") == {name: {"ok": "pong"}}
    assert celery(bulk, name, "inspect", "active") == {name: []}


def test_inspect_knows_tasks_queue_and_what_was_done(bulk: BulkSystem, name: str) -> None:
    bulk.wait_over(bulk.submit(b'{"prompt":"hello","max_tokens":1}\n'))
    inspect = make_app(bulk.system.redis_url).control.inspect([name], timeout=TIMEOUT_S)
    tasks = {task_name(kind) for kind in get_args(StepKind)}
    assert tasks <= set(inspect.registered()[name])
    assert [queue["name"] for queue in inspect.active_queues()[name]] == [QUEUE]
    done = inspect.stats()[name]["total"]
    assert all(done[task] >= 1 for task in tasks - {task_name("close")})
    assert inspect.conf()[name]["task_acks_late"] is True
