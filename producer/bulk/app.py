"""The Celery application: one short task for each kind of step.

Redis is broker and result backend. Tasks are acknowledged when they are done, so that those of a
worker that was killed come again; they never wait for answers.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, get_args

from celery import Celery

from openlora.errors import OpenLoRAError, Overloaded
from producer.bulk.records import BatchState, LineError, Step, StepKind
from producer.bulk.steps import InputUnusable, Tools, run_step
from producer.bulk.steward import Steward

QUEUE = "openlora.batches"
VISIBILITY_TIMEOUT_S = 60
"""Redis gives a task that was not acknowledged to another worker after this; a step takes a few
seconds at most."""
MAX_RETRIES = 5
LONGEST_BACKOFF_S = 30

logger = logging.getLogger("producer.tasks")


def make_app(redis_url: str) -> Celery:
    """The application without tasks: enough to queue them, and for Celery's own tools."""
    app = Celery("openlora", broker=redis_url, backend=redis_url)
    app.conf.update(
        task_default_queue=QUEUE,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_track_started=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=True,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT_S},
        result_expires=3600,
    )
    return app


def queue_step(app: Celery, batch_id: str, step: Step) -> None:
    """Put a step into the queue. Raises OSError where Redis does not answer."""
    try:
        app.send_task(task_name(step.kind), args=(batch_id, step.number))
    except app.backend_exceptions as error:
        raise OSError(f"the task queue does not answer: {error}") from error


def task_name(kind: str) -> str:
    """The name by which Celery's tools show a step."""
    return f"openlora.batch.{kind}"


def add_tasks(app: Celery, tools: Tools, steward: Steward) -> None:
    """Register the tasks that do the work with ``tools``."""

    def task_for(kind: StepKind) -> None:
        def task(self: Any, batch_id: str, number: int) -> str:
            try:
                return do_step(tools, steward, batch_id, Step(kind, number))
            except (Overloaded, OSError) as error:
                logger.warning(
                    "event=step_failed step=%s:%d error=%r next=retry", kind, number, error
                )
                with suppress(OpenLoRAError):
                    tools.states.report_problem(batch_id, str(error)[:500])
                countdown = min(LONGEST_BACKOFF_S, 2**self.request.retries)
                raise self.retry(exc=error, countdown=countdown) from error

        name = task_name(kind)
        app.task(task, name=name, bind=True, shared=False, max_retries=MAX_RETRIES)

    for kind in get_args(StepKind):
        task_for(kind)


def do_step(tools: Tools, steward: Steward, batch_id: str, step: Step) -> str:
    """Do one step if the batch still waits for it, and queue what comes next.

    Raises:
        Overloaded, OSError: not now; try again.
    """
    state = tools.states.get(batch_id)
    if state is None or state.step != step.token:
        return "done before"
    try:
        fields = run_step(tools, state, step)
    except InputUnusable as error:
        _fail(tools, state, step, error)
    except FileNotFoundError:
        newest = tools.states.get(batch_id)
        if newest is not None and newest.step == step.token:
            raise
        _clear_after(tools, state)
        return "done before"  # somebody else finished it, and cleared up
    else:
        if not tools.states.finish(batch_id, step, fields):
            _clear_after(tools, state)
    steward.advance(batch_id)
    return "done"


def _clear_after(tools: Tools, state: BatchState) -> None:
    """A step came late: where the batch is over, nobody else takes away what it wrote."""
    newest = tools.states.get(state.id)
    if newest is None or newest.phase == "over":
        tools.folder(state).remove_working_files()


def _fail(tools: Tools, state: BatchState, step: Step, error: InputUnusable) -> None:
    logger.error("event=batch_failed batch=%s reason=%r", state.id, error.message)
    tools.states.add_error(state.id, [LineError(error.code, error.message)])
    tools.states.stop_workers(state.id)
    tools.states.finish(state.id, step, {"phase": "closing", "ending": "failed"})
