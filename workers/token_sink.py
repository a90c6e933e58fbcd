"""Hop 7: what the runs have to say goes into their logs, in one call per step and shard.

The answer per job says how it stands: taken, or why not. Redis being away is waited out: nothing
is dropped, the loop stands still, so the engine's socket fills and the engine waits too.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum, auto
from typing import TypeVar

from openlora.errors import Overloaded
from openlora.joblog import ASK, AppendResult, Claim, JobLog, Newest
from openlora.protocol.events import Chunk
from workers.run import Run

T = TypeVar("T")

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0
ASK_INTERVAL_S = 0.5
"""How old a log's answer about a job, in which its lease was looked at, may become."""

SLOW_S = 0.5
"""An answer that took longer came from a Redis that was away meanwhile, or as good as that."""
LENIENT_S = 3.0
"""How long nothing is cancelled after Redis was away: leases ran out that gateways now renew."""

logger = logging.getLogger("workers.token_sink")


class Stopped(Exception):
    """The worker was told to stop at once while it waited for Redis."""


class Verdict(Enum):
    """What the log's answer means for a run."""

    GOES_ON = auto()
    ENDED = auto()
    CANCEL = auto()
    MOVED = auto()
    """Another worker has it, or nobody wants it: drop the work, say nothing."""
    ANEW = auto()
    """Its log holds another text: claim it again and go on from there."""


class TokenSink:
    """Appends for all runs; used by the loop's thread alone.

    Args:
        stop_now: set when the worker must not wait any longer.
    """

    def __init__(
        self,
        job_log: JobLog,
        worker_id: str,
        stop_now: threading.Event,
    ) -> None:
        self._job_log = job_log
        self._worker_id = worker_id
        self._stop_now = stop_now
        self._lenient_until = -math.inf
        self.tokens_logged = 0

    def append(self, runs: Sequence[Run]) -> list[tuple[Run, Verdict]]:
        """Log what each run has not logged yet (nothing new: ask how it stands).

        Returns what becomes of those that do not simply go on.

        Raises:
            Stopped: the worker must stop now.
        """
        return self.append_in_parts([runs])

    def append_in_parts(self, parts: Iterable[Sequence[Run]]) -> list[tuple[Run, Verdict]]:
        """As ``append``; Redis works on one part while ``parts`` makes the next.

        A run is in one part alone.
        """
        verdicts: list[tuple[Run, Verdict]] = []
        while True:
            again = self._append_once(parts, verdicts)
            if not again:
                return verdicts
            parts = [again]

    def _append_once(
        self, parts: Iterable[Sequence[Run]], verdicts: list[tuple[Run, Verdict]]
    ) -> list[Run]:
        """Adds to ``verdicts``; → the runs whose chunk must go again."""
        now = time.monotonic()
        fresh = now - ASK_INTERVAL_S
        made: list[tuple[Sequence[Run], list[Chunk], list[int]]] = []
        coming = iter(parts)

        def chunks() -> Iterator[tuple[list[Chunk], list[int]]]:
            for _, known, entries in [*made]:  # of an attempt that Redis did not answer
                yield known, entries
            for runs in coming:
                new = [run.chunk() for run in runs]
                entries = [run.entries if run.last_heard > fresh else ASK for run in runs]
                made.append((runs, new, entries))
                yield new, entries

        answers_of_parts = self.patiently(lambda: self._job_log.extend(chunks()))
        again: list[Run] = []
        for (runs, sent, _), answers in zip(made, answers_of_parts, strict=True):
            for position, (run, chunk) in enumerate(zip(runs, sent, strict=True)):
                answer = answers.get(position) if answers else None
                if answer is None:
                    count = len(chunk.tokens)
                    self.tokens_logged += count
                    run.logged += count
                    run.entries += 1
                    continue
                run.last_heard = now
                run.entries = answer.entries
                verdict = self._judge(run, answer)
                if verdict is None:
                    again.append(run)
                elif verdict is not Verdict.GOES_ON:
                    verdicts.append((run, verdict))
        return again

    def patiently(self, call: Callable[[], T]) -> T:
        """``call`` until Redis answers it. Raises Stopped when the worker must stop now."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            began = time.monotonic()
            try:
                answer = call()
            except Overloaded as error:
                if backoff_s == FIRST_BACKOFF_S:
                    logger.warning("event=redis_away error=%r next=hold_and_retry", error.message)
            else:
                # The client waits and asks again by itself before it says that Redis is away.
                now = time.monotonic()
                if backoff_s > FIRST_BACKOFF_S or now - began > SLOW_S:
                    self._lenient_until = now + LENIENT_S
                return answer
            if self._stop_now.wait(backoff_s):
                raise Stopped
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    def is_cancelled(self, answer: AppendResult | Claim) -> bool:
        """Whether the log says so, and not because Redis was away a moment ago."""
        return answer.cancelled and time.monotonic() >= self._lenient_until

    def disown(self, job_ids: Sequence[str]) -> list[Newest]:
        """Claim for nobody what is this worker's of the jobs: the sweeper publishes it again.

        Returns each job's newest claim. Raises Stopped as ``append`` does.
        """
        return self.patiently(lambda: self._job_log.disown(job_ids, self._worker_id))

    def _judge(self, run: Run, result: AppendResult) -> Verdict | None:
        """The verdict on one run; None where its chunk must go again."""
        if result.status == "taken":
            self.tokens_logged += len(run.tokens) - run.logged
            run.logged = len(run.tokens)
            if run.end is not None:
                return Verdict.ENDED
            return Verdict.CANCEL if self.is_cancelled(result) else Verdict.GOES_ON
        if result.status == "fenced":
            logger.info("event=fenced job=%s next=drop_run", run.job.job_id)
            return Verdict.MOVED
        if result.status == "gap" and result.length <= len(run.tokens):
            # Redis came back without its last moments; we still have them.
            logger.warning(
                "event=log_shorter job=%s length=%d next=log_again", run.job.job_id, result.length
            )
            run.logged = result.length
            return None
        return self._anew(run) if result.status == "gap" else self._restore(run, result.status)

    def _anew(self, run: Run) -> Verdict:
        logger.warning("event=log_differs job=%s next=claim_anew", run.job.job_id)
        return Verdict.ANEW

    def _restore(self, run: Run, status: str) -> Verdict | None:
        """Put back what Redis lost of a run: our claim, or all of the job."""
        logger.warning("event=log_%s job=%s next=restore", status, run.job.job_id)
        claim = self.patiently(
            lambda: self._job_log.restore(run.job, run.epoch, self._worker_id),
        )
        if claim.status != "claimed":
            logger.info("event=claim_not_restored job=%s next=drop_run", run.job.job_id)
            return Verdict.MOVED
        # A worker that our lost claim had fenced may have appended meanwhile. Ours may be another
        # text: two of them in one log would be nobody's.
        return None if run.follows(claim.chunks) else self._anew(run)
