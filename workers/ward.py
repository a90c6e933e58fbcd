"""Where jobs run that were in an engine when it crashed: alone, one after the other, for a while.

Only one of them did it, and nobody knows which. Each suspect in turn runs with nothing else in the
engine until it has made a few tokens more; then it is let back among the others. If the engine
crashes meanwhile, the others were not in it. A job suspected again is watched for longer, in the
end until it ends.

The others are taken out of the engine for that time, and go on with their next token after it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

from openlora.joblog.crashes import Suspicion
from workers.engine_client import EngineClient
from workers.run import Run

TRIAL_TOKENS = (4, 32, 256)
"""Tokens of a trial after the first, second and third crash; from the fourth on, to the end."""

logger = logging.getLogger("workers.ward")


def trial_tokens(suspicion: Suspicion) -> float:
    """How many tokens a suspect has to make alone."""
    tried = max(1, suspicion.crashes) - 1
    return TRIAL_TOKENS[tried] if tried < len(TRIAL_TOKENS) else float("inf")


class Ward:
    """Decides which runs are in the engine; used by the loop's thread alone.

    Args:
        next_ticket: a number no run has had.
        rename: the run's ticket was changed to this one.
        is_open: whether the run is still ours and has not ended.
        step_aside: takes out of the engine for now what is no run of the loop; how many that is.
        line_on_trial: whether a line of a bundle needs the engine for itself.
    """

    def __init__(
        self,
        engine: EngineClient,
        *,
        next_ticket: Callable[[], int],
        rename: Callable[[Run, int], None],
        is_open: Callable[[Run], bool],
        step_aside: Callable[[], int],
        line_on_trial: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._next_ticket = next_ticket
        self._rename = rename
        self._is_open = is_open
        self._step_aside = step_aside
        self._line_on_trial = line_on_trial
        self._suspects: deque[Run] = deque()
        self._held: list[Run] = []
        self._trial: Run | None = None
        self._trial_ends_at: float = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: nobody is suspected, held, or to be held."""
        return not (self.has_suspects or self._held or self._line_on_trial())

    @property
    def has_suspects(self) -> bool:
        """Whether a job is suspected: nothing but jobs begins before all of those were tried."""
        return bool(self._suspects) or self._trial is not None

    def begin(self, run: Run) -> None:
        """A new run: into the engine, unless it is suspected or somebody who is runs now."""
        if run.suspicion.crashes:
            self._suspects.append(run)
        elif self.has_suspects or self._line_on_trial():
            self._held.append(run)
        else:
            self._start(run)

    def turn(self, runs: Iterable[Run]) -> None:
        """Go on where a trial is over. ``runs``: all of the loop's."""
        if self._trial is not None and not self._is_over(self._trial):
            return
        self._trial = None
        while self._suspects and not self._is_open(self._suspects[0]):
            self._suspects.popleft()
        if self._suspects:
            self._hold(list(runs))
            lines = self._step_aside()
            if lines:
                logger.info("event=lines_step_aside lines=%d next=run_after_suspects", lines)
            self._try(self._suspects.popleft())
            return
        if self._line_on_trial():
            self._hold(list(runs))
            return
        held, self._held = self._held, []
        for run in held:
            if self._is_open(run):
                self._start(run)

    def _is_over(self, run: Run) -> bool:
        if not self._is_open(run):
            return True
        if len(run.tokens) < self._trial_ends_at:
            return False
        logger.info("event=suspect_cleared job=%s next=among_the_others", run.job.job_id)
        return True

    def _try(self, run: Run) -> None:
        self._trial = run
        self._trial_ends_at = len(run.tokens) + trial_tokens(run.suspicion)
        logger.warning(
            "event=suspect_tried job=%s crashes=%d alone=%d next=run_alone",
            *(run.job.job_id, run.suspicion.crashes, run.suspicion.alone),
        )
        self._start(run)

    def _hold(self, runs: Iterable[Run]) -> None:
        for run in runs:
            if run.in_engine:
                self._engine.abort(run.ticket)
                run.in_engine = False
                # Tokens of the old ticket may be on their way: they will be made again.
                self._rename(run, self._next_ticket())
                self._held.append(run)

    def _start(self, run: Run) -> None:
        self._engine.start(run.start_message())
        run.started()
