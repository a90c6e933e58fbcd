"""The steward: looks at open batches and queues what each needs next.

It holds nothing: whatever process dies, the next look at Redis says how to go on. Several stewards
do no harm, since a step is begun by compare-and-set.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import cast

import redis

from openlora.errors import OpenLoRAError, Overloaded
from producer.bulk.records import (
    STEP_LOST_MS,
    BatchState,
    Change,
    Step,
    StepKind,
    is_past,
    next_move,
)
from producer.bulk.state import BatchStates, now_ms
from producer.bulk.workers_seen import heartbeats, nothing_pending

PERIOD_S = 0.25
_ERROR_PAUSE_S = 1.0
_PENDING_CHECK_MS = 5000

logger = logging.getLogger("producer.steward")


class Steward:
    """Moves batches on. ``queue`` puts a step of a batch into Celery's queue; it may raise OSError.

    ``advance`` may be called by any thread.
    """

    def __init__(
        self, states: BatchStates, client: redis.Redis, queue: Callable[[str, Step], None]
    ) -> None:
        self._states = states
        self._client = client
        self._queue = queue
        # A step that was queued before this process began may have died with the one before it.
        self._began_ms = now_ms()
        # Steps that were begun, and that the queue did not take.
        self._not_queued: dict[str, Step] = {}

    def run(self, stopping: threading.Event) -> None:
        """Until ``stopping`` is set. What fails is logged and looked at again."""
        while not stopping.is_set():
            try:
                for batch_id in self._states.open_ids():
                    self.advance(batch_id)
            except (OpenLoRAError, OSError, redis.RedisError) as error:
                logger.warning("event=look_failed error=%r next=look_again", error)
                stopping.wait(_ERROR_PAUSE_S)
            stopping.wait(PERIOD_S)

    def advance(self, batch_id: str) -> None:
        """Queue the batch's next step, if it has one now.

        Raises:
            Overloaded, OSError: Redis does not answer.
        """
        while (state := self._states.get(batch_id)) is not None:
            if state.is_expired(now_ms()):
                logger.info("event=batch_expired batch=%s next=close", batch_id)
                self._states.end(batch_id, "expired")
                continue
            if state.step:
                self._queue_again_if_lost(state)
                return
            if state.phase == "over":
                self._states.close(state)
                return
            move = next_move(state, now_ms(), nothing_pending=self._nothing_pending(state))
            if move is None:
                return
            if isinstance(move, Change):
                logger.info("event=batch batch=%s %s", batch_id, move.fields)
                self._states.change(state, move.fields)
            else:
                if self._states.begin(state, move):
                    self._put(batch_id, move)
                return

    def _put(self, batch_id: str, step: Step) -> None:
        try:
            self._queue(batch_id, step)
        except OSError:
            self._not_queued[batch_id] = step
            raise
        self._not_queued.pop(batch_id, None)

    def _queue_again_if_lost(self, state: BatchState) -> None:
        kind, _, number = state.step.partition(":")
        step = Step(cast(StepKind, kind), int(number))
        is_lost = (
            self._not_queued.get(state.id) == step
            or is_past(state.step_ms, STEP_LOST_MS, now_ms())
            or state.step_ms < self._began_ms
        )
        if is_lost and self._states.begin(state, step):
            logger.warning(
                "event=step_lost batch=%s step=%s next=queue_again", state.id, step.token
            )
            self._put(state.id, step)

    def _nothing_pending(self, state: BatchState) -> bool:
        """Asked only where a running batch has been silent for a while."""
        if state.phase != "running" or not is_past(state.last_ms, _PENDING_CHECK_MS, now_ms()):
            return False
        try:
            return nothing_pending(heartbeats(self._client))
        except Overloaded:
            return False
