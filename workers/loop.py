"""Hop 4: admit → step → emit. One thread owns every run; nothing else touches their state.

Each turn reads what the engine said, logs it with one call, then admits a few messages. Tokens go
first, and few messages are admitted at a time, so that a burst of new jobs does not stall those
that stream.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from openlora.errors import DeadlineExceeded, error_from_code
from openlora.joblog.crashes import Suspicion
from openlora.protocol.codec import encode
from openlora.protocol.names import JOBS_TOPIC
from workers.admission import Admission
from workers.backlog import Fetched
from workers.bulk import BulkLane
from workers.consumer import JobConsumer
from workers.dead_letters import condemned, unrunnable
from workers.deadlines import Deadlines
from workers.ended_runs import EndedRuns
from workers.engine_client import EngineClient
from workers.let_go import LetGo
from workers.messages import Load, StepOutputs
from workers.offsets import Position
from workers.run import Run, failure_of, now_ms
from workers.token_sink import TokenSink, Verdict
from workers.waiting import Waiting
from workers.ward import Ward

ADMIT_AT_ONCE = 16
EMIT_AT_ONCE = 25
PROBE_INTERVAL_S = 0.5
"""A run that has nothing to say asks its log this often whether it was cancelled, lost its lease
or moved, maybe while Redis was away; the control channel would tell of cancels alone."""

logger = logging.getLogger("workers.loop")


class WorkerLoop:
    """The runs of this worker. ``deliver`` and ``retire`` may be called from any thread."""

    def __init__(
        self,
        engine: EngineClient,
        sink: TokenSink,
        consumer: JobConsumer,
        retire: Callable[[list[str]], None],
    ) -> None:
        self.load = Load(0, 0, ())
        self._engine = engine
        self._sink = sink
        self._consumer = consumer
        self._retire_jobs = retire
        self._admission: Admission | None = None
        self._bulk: BulkLane | None = None
        self._runs: dict[int, Run] = {}
        self._by_job: dict[str, Run] = {}
        self._let_go = LetGo(sink)
        self._ended = EndedRuns(sink, self._let_go)
        self._deadlines = Deadlines()
        self._inbox: deque[Fetched] = deque()
        self._retired: deque[list[str]] = deque()
        self._tickets = itertools.count()
        self._probe_due = 0.0
        self._waiting = Waiting(engine)
        self._ward = Ward(
            engine,
            next_ticket=self.next_ticket,
            rename=self._rename,
            is_open=self._is_open,
            step_aside=lambda: 0 if self._bulk is None else self._bulk.step_aside(),
            line_on_trial=lambda: self._bulk is not None and self._bulk.is_on_trial,
        )

    def _is_open(self, run: Run) -> bool:
        return run.end is None and self._by_job.get(run.job.job_id) is run

    def _rename(self, run: Run, ticket: int) -> None:
        del self._runs[run.ticket]
        run.ticket = ticket
        self._runs[ticket] = run

    def set_admission(self, admission: Admission) -> None:
        """How messages become runs; once, before the first turn."""
        self._admission = admission

    def set_bulk(self, lane: BulkLane) -> None:
        """Who runs bundles of lines; once, before the first turn."""
        self._bulk = lane

    def next_ticket(self) -> int:
        """A number no run has had."""
        return next(self._tickets)

    @property
    def open_runs(self) -> int:
        """Runs that have not ended."""
        return len(self._runs)

    @property
    def bulk_lines_in_engine(self) -> int:
        """Lines of bundles that the engine has now."""
        return 0 if self._bulk is None else self._bulk.lines_in_engine

    def runs_in_engine(self) -> list[Run]:
        """Runs that the engine has now, or had when it died."""
        return [run for run in self._runs.values() if run.in_engine]

    def condemn(self, run: Run, suspicion: Suspicion) -> None:
        """End a run for good, whose engine died of it once too often."""
        run.suspicion = suspicion
        run.in_engine = False
        run.fail(failure_of(condemned(suspicion)))
        self._append([run])

    def open_work(self) -> list[tuple[bytes, list[Position]]]:
        """Interactive jobs that others can take: the message, and the positions that it is for."""
        runs = [run for run in self._runs.values() if run.job.priority == "interactive"]
        waiting = [f for f in self._inbox if f.position.partition[0] == JOBS_TOPIC]
        return [(encode(run.job), run.positions) for run in runs] + [
            (fetched.value, [fetched.position]) for fetched in waiting
        ]

    def deliver(self, batch: Iterable[Fetched]) -> None:
        """Messages to admit. Thread-safe."""
        self._inbox.extend(batch if self._bulk is None else self._bulk.deliver(batch))
        self.wake()

    def retire(self, job_ids: list[str]) -> None:
        """Jobs whose offsets are committed. Thread-safe."""
        self._retired.append(job_ids)

    def wake(self) -> None:
        """End the current wait for events. Thread-safe."""
        self._waiting.wake()

    def drop_inbox(self) -> None:
        """Leave messages that were not admitted yet to the next owner: their offsets stay open."""
        self._inbox.clear()
        if self._bulk is not None:
            self._bulk.drop_all()

    def turn(self, timeout_s: float) -> None:
        """Wait for events for ``timeout_s`` at most, then handle all of them once.

        Raises:
            EngineGone: the engine process has ended.
            Stopped: the worker must stop now and Redis does not answer.
        """
        bulk = self._bulk
        # The bulk lane waits while a suspect runs: it has nothing to do before the engine speaks.
        is_free = not self._ward.has_suspects
        has_lines = is_free and bulk is not None and bulk.could_admit(self.open_runs)
        due_s = min(timeout_s, PROBE_INTERVAL_S, self._deadlines.next_in_s(now_ms()))
        self._waiting.wait(0.0 if self._inbox or has_lines else due_s)
        steps = self._engine.receive()
        if steps:
            self._emit(steps)
            if bulk is not None:
                bulk.take(steps)
        self._take_read()
        if self._inbox:
            self._admit()
        elif bulk is not None and not bulk.is_idle and not self._ward.has_suspects:
            bulk.refill(self.open_runs)
        if not self._ward.is_idle:
            self._ward.turn(self._runs.values())
        self._end_overdue()
        if time.monotonic() >= self._probe_due:
            self._probe()
        while self._retired:
            job_ids = self._retired.popleft()
            self._sink.patiently(lambda job_ids=job_ids: self._retire_jobs(job_ids))  # type: ignore[misc]
        self._engine.flush()

    def _emit(self, steps: Sequence[StepOutputs]) -> None:
        # A large step goes out in parts, so that Redis and gateway work on the first while the
        # next is made. Behind its time, the loop logs several steps together instead.
        most = EMIT_AT_ONCE if len(steps) == 1 else len(self._runs) + 1
        self._heed(self._sink.append_in_parts(self._take(steps, most)))

    def _take(self, steps: Sequence[StepOutputs], most: int) -> Iterator[list[Run]]:
        """Gives the runs what the engine said; → those that it spoke of, ``most`` at a time."""
        touched: dict[int, Run] = {}
        runs = self._runs
        for step in steps:
            if step.load is not None:
                self.load = step.load
            for output in step.outputs:
                run = runs.get(output.ticket)
                if run is None or run.end is not None:
                    continue  # ended here while the engine's token was on its way
                if len(touched) >= most:
                    yield list(touched.values())
                    touched.clear()
                touched[output.ticket] = run
                if output.fault is not None:
                    run.in_engine = False
                    run.fail(failure_of(error_from_code(output.fault.code, output.fault.message)))
                    continue
                reason = run.take(output) or output.finish_reason
                run.in_engine = output.finish_reason is None
                if reason is not None:
                    run.finish(reason)  # type: ignore[arg-type]
        if touched:
            yield list(touched.values())

    def _append(self, runs: list[Run]) -> None:
        """Log what the runs have to say and do what the answers ask for."""
        self._heed(self._sink.append(runs))

    def _heed(self, verdicts: Sequence[tuple[Run, Verdict]]) -> None:
        cancelled = []
        for run, verdict in verdicts:
            if verdict is Verdict.CANCEL:
                run.finish("cancelled")
                cancelled.append(run)
            elif verdict is Verdict.ANEW:
                self._leave(run)
                message = encode(run.job)
                self._inbox.extend(Fetched(at, None, message) for at in run.positions)
            else:
                self._forget(run, ended=verdict is Verdict.ENDED)
        if cancelled:
            self._append(cancelled)

    def _leave(self, run: Run) -> None:
        if run.in_engine:
            self._engine.abort(run.ticket)
        self._runs.pop(run.ticket, None)
        self._by_job.pop(run.job.job_id, None)

    def _forget(self, run: Run, *, ended: bool) -> None:
        self._leave(run)
        now = time.monotonic()
        if ended:
            self._ended.add(run, now)
        else:
            self._let_go.add(run.job.job_id, now)
        positions = run.positions
        failure = unrunnable(run.end) if ended else None
        if failure is not None:
            # The log has the end already; the letter ends the message once the broker has it.
            assert self._admission is not None
            message = Fetched(positions[0], None, encode(run.job))
            self._admission.dead_letters.write(
                message, failure.code, failure.message, run.job.job_id, run.suspicion.story
            )
            positions = positions[1:]
        for position in positions:
            self._consumer.end(position, run.job.job_id if ended else None)

    def _admit(self) -> None:
        assert self._admission is not None
        batch = [self._inbox.popleft() for _ in range(min(ADMIT_AT_ONCE, len(self._inbox)))]
        runs = self._admission.admit(batch, self._by_job)
        for run in runs:
            self._runs[run.ticket] = run
            self._by_job[run.job.job_id] = run
            if run.end is None:
                self._deadlines.add(run.job, self._by_job)
        self._begin(runs)

    def _take_read(self) -> None:
        """Go on with runs whose long prompts were read meanwhile."""
        if self._admission is not None:
            self._begin(self._admission.take_read(self._is_open))

    def _begin(self, runs: Sequence[Run]) -> None:
        for run in runs:
            if run.end is None and run.start is not None:
                self._ward.begin(run)
        ended = [run for run in runs if run.end is not None]
        if ended:
            self._append(ended)

    def _end_overdue(self) -> None:
        overdue = []
        for job_id in self._deadlines.passed(now_ms()):
            run = self._by_job.get(job_id)
            if run is not None:  # else it ended in time
                run.fail(failure_of(DeadlineExceeded("the deadline passed while the job ran")))
                overdue.append(run)
        if overdue:
            self._append(overdue)

    def _probe(self) -> None:
        now = time.monotonic()
        self._probe_due = now + PROBE_INTERVAL_S
        silent = [run for run in self._runs.values() if now - run.last_heard >= PROBE_INTERVAL_S]
        if silent:
            self._append(silent)
        self._ended.turn(now)
        self._let_go.turn(now, self._by_job)

    def close(self) -> None:
        """Free what the loop itself holds."""
        self._waiting.close()
