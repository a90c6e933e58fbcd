"""What Celery is told about steps: when it has done them, and when to try one again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from celery.app.task import Task

from openlora.errors import Overloaded
from producer.bulk import app as tasks
from producer.bulk.app import MAX_RETRIES, VISIBILITY_TIMEOUT_S, add_tasks, make_app, task_name
from producer.bulk.records import STEP_LOST_MS
from producer.bulk.steps import Tools
from producer.bulk.steward import Steward


def test_a_task_is_done_when_it_has_run_and_comes_again_where_its_worker_died() -> None:
    conf = make_app("redis://127.0.0.1:1/0").conf
    assert conf.task_acks_late
    assert conf.task_reject_on_worker_lost
    assert conf.broker_transport_options == {"visibility_timeout": VISIBILITY_TIMEOUT_S}
    assert 1000 * VISIBILITY_TIMEOUT_S <= STEP_LOST_MS


@pytest.mark.parametrize("error", [Overloaded("no broker"), OSError(28, "No space left on device")])
def test_a_step_that_fails_is_tried_again_later_and_later(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    problems: list[str] = []
    countdowns: list[float] = []

    def fail(*args: object) -> str:
        raise error

    def retry(self: Task, **options: Any) -> Any:
        countdowns.append(options["countdown"])
        return again(self, **options)

    again = Task.retry
    monkeypatch.setattr(Task, "retry", retry)
    monkeypatch.setattr(tasks, "do_step", fail)
    app = make_app("redis://127.0.0.1:1/0")
    app.conf.task_always_eager = True
    states = SimpleNamespace(report_problem=lambda batch_id, problem: problems.append(problem))
    add_tasks(app, cast(Tools, SimpleNamespace(states=states)), cast(Steward, None))
    outcome = app.tasks[task_name("publish")].apply(args=("batch_1", 0))
    assert outcome.failed()
    assert countdowns == [1, 2, 4, 8, 16, 30]
    assert len(countdowns) == MAX_RETRIES + 1  # the last one is refused
    assert problems == [str(error)] * len(countdowns)
