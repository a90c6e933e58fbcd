"""Hop 4, first half: messages of Kafka become runs of the engine, or end here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import msgspec

from openlora.adapters.merge_spec import MergeSpec
from openlora.adapters.stores import Store
from openlora.errors import (
    AdapterFailed,
    DeadlineExceeded,
    InvalidRequest,
    OpenLoRAError,
)
from openlora.joblog import Claim, JobLog
from openlora.joblog.crashes import CrashLog, Suspicion
from openlora.protocol.codec import decode_job
from openlora.protocol.events import FinishReason
from openlora.protocol.jobs import Job
from openlora.protocol.names import JOB_ID_LENGTH, is_job_id
from workers.adapter_tokenizers import AdapterTokenizers, ChosenTokenizer
from workers.backlog import Fetched
from workers.dead_letters import DeadLetters, condemned
from workers.engine_client import EngineClient
from workers.messages import ModelFacts, Start, weights_of
from workers.reading import Reader, is_long
from workers.run import Run, failure_of, now_ms
from workers.token_sink import TokenSink

logger = logging.getLogger("workers.admission")


class Begun(NamedTuple):
    """A claimed job but for its prompt's token IDs.

    ``reason``: why it is finished already; ``unreadable``: what is wrong with its adapters.
    """

    run: Run
    reason: FinishReason | None
    unreadable: AdapterFailed | None


@dataclass(frozen=True, slots=True)
class Admission:
    """Everything it takes to turn a message into a run. Used by the loop's thread alone.

    Attributes:
        end_position: (position, job ID or None): the message needs nothing more from us.
        next_ticket: a number never used before.
        reader: of long prompts.
    """

    worker_id: str
    job_log: JobLog
    sink: TokenSink
    engine: EngineClient
    facts: ModelFacts
    tokenizers: AdapterTokenizers
    adapters: Store
    dead_letters: DeadLetters
    crash_log: CrashLog
    end_position: Callable[[Fetched, str | None], None]
    next_ticket: Callable[[], int]
    reader: Reader[Begun]

    def admit(self, batch: Sequence[Fetched], running: dict[str, Run]) -> list[Run]:
        """New runs: to be started, or with their ``end`` set and not logged yet, or with neither:
        those are told of by ``take_read`` later.

        ``running``: job ID → run; a message of a job that runs here only adds its position.
        """
        fresh: dict[str, tuple[Job, Fetched]] = {}
        duplicates: list[tuple[str, Fetched]] = []
        for fetched in batch:
            try:
                job = parse_job(fetched.value)
            except InvalidRequest as error:
                self.dead_letters.write(fetched, error.code, error.message)
                continue
            run = running.get(job.job_id)
            if run is not None:
                run.positions.append(fetched.position)
            elif job.job_id in fresh:
                duplicates.append((job.job_id, fetched))
            else:
                fresh[job.job_id] = (job, fetched)
        runs = self._claim(fresh)
        by_job = {run.job.job_id: run for run in runs}
        for job_id, fetched in duplicates:
            if job_id in by_job:
                by_job[job_id].positions.append(fetched.position)
            else:
                self.end_position(fetched, None)
        return runs

    def _claim(self, fresh: dict[str, tuple[Job, Fetched]]) -> list[Run]:
        if not fresh:
            return []
        job_ids = list(fresh)
        claims = self.sink.patiently(lambda: self.job_log.claim(job_ids, self.worker_id))
        suspicions = self._suspicions(claims, job_ids)
        hashes = [adapter.hash for job, _ in fresh.values() for adapter in job.adapters]
        quarantined = self.sink.patiently(lambda: self.crash_log.quarantined(hashes))
        runs = []
        for (job, fetched), claim in zip(fresh.values(), claims, strict=True):
            restarted = claim.status == "missing"
            if restarted:
                logger.warning("event=log_missing job=%s next=recreate", job.job_id)
                claim = self._recreate(job)
                restarted = not claim.chunks
            if claim.status != "claimed":
                self.end_position(fetched, job.job_id)
                continue
            run = self._begin(job, fetched, claim, restarted)
            run.suspicion = suspicions.get(job.job_id, run.suspicion)
            if run.end is None:
                self._refuse(run, quarantined)
            runs.append(run)
        return runs

    def _suspicions(self, claims: Sequence[Claim], job_ids: Sequence[str]) -> dict[str, Suspicion]:
        """What is held against jobs that somebody had claimed before."""
        again = [job_id for job_id, claim in zip(job_ids, claims, strict=True) if claim.before]
        found = self.sink.patiently(lambda: self.crash_log.suspicions(again))
        return dict(zip(again, found, strict=True))

    def _refuse(self, run: Run, quarantined: Mapping[str, str]) -> None:
        """End a run that would only end the engine once more."""
        if run.suspicion.is_deadly:
            run.fail(failure_of(condemned(run.suspicion)))
            return
        for adapter in run.job.adapters:
            if adapter.hash in quarantined:
                run.fail(failure_of(AdapterFailed(quarantined[adapter.hash])))
                return

    def _recreate(self, job: Job) -> Claim:
        return self.sink.patiently(lambda: self.job_log.recreate(job, self.worker_id))

    def _begin(self, job: Job, fetched: Fetched, claim: Claim, restarted: bool) -> Run:
        chosen, unreadable = self._tokenizer(job)
        run = Run(
            job,
            self.next_ticket(),
            claim.epoch,
            fetched.position,
            chosen.prompt.backend,
            (*self.facts.eos_token_ids, *chosen.eos_token_ids),
        )
        run.restarted = restarted
        reason = run.resume(claim.chunks)
        if reason is None and self.sink.is_cancelled(claim):
            reason = "cancelled"
        begun = Begun(run, reason, unreadable)
        if (job.prompt is None) == (job.messages is None):
            error = InvalidRequest("the job must have exactly one of prompt and messages")
            run.fail(failure_of(error))
        elif is_long(job):
            self.reader.begin(begun, job.tenant, chosen.prompt, job)
        else:
            self._go_on(begun, lambda: chosen.prompt.encode(job))
        return run

    def take_read(self, is_open: Callable[[Run], bool]) -> list[Run]:
        """Runs whose long prompt was read meanwhile: to be started, or with their ``end`` set.
        ``is_open``: whether one is still ours and has not ended."""
        runs = []
        for begun, answer in self.reader.finished():
            if is_open(begun.run):
                self._go_on(begun, partial(_given, answer))
                runs.append(begun.run)
        return runs

    def _go_on(self, begun: Begun, prompt: Callable[[], list[int]]) -> None:
        """Everything but the prompt's token IDs is known."""
        run = begun.run
        try:
            prompt_token_ids = prompt()
            self.facts.check_length(len(prompt_token_ids))
            run.prompt_tokens = len(prompt_token_ids)
            if begun.reason is not None:
                run.finish(begun.reason)
            elif begun.unreadable is not None:
                raise begun.unreadable
            else:
                self._start(run, prompt_token_ids)
        except OpenLoRAError as error:
            run.fail(failure_of(error))

    def _tokenizer(self, job: Job) -> tuple[ChosenTokenizer, AdapterFailed | None]:
        """The job's, and why its adapters' cannot be had: it may have ended all the same."""
        try:
            return self.tokenizers.of(map(self.adapters.path, (a.hash for a in job.adapters))), None
        except AdapterFailed as error:
            return self.tokenizers.of(()), error

    def _start(self, run: Run, prompt_token_ids: list[int]) -> None:
        job = run.job
        if job.deadline_ms is not None and now_ms() >= job.deadline_ms:
            raise DeadlineExceeded("the deadline passed before the job could start")
        MergeSpec(**msgspec.structs.asdict(job.merge)).check()
        for adapter in job.adapters:
            self.engine.register(adapter.hash, str(self.adapters.path(adapter.hash)))
        run.start = Start(
            ticket=run.ticket,
            prompt_token_ids=tuple(prompt_token_ids),
            params=job.params,
            adapters=weights_of(job.adapters),
            priority=job.priority,
            merge=job.merge,
            tenant=job.tenant,
        )


def _given(answer: list[int] | Exception) -> list[int]:
    if isinstance(answer, Exception):
        raise answer
    return answer


def parse_job(value: bytes) -> Job:
    """The job of a message: anybody can write to the topic, not the gateway alone.

    Raises:
        InvalidRequest: it is no job, or one that no log can be kept of. Whatever else is wrong with
            a job ends in its log: one that stayed open would be published again.
    """
    job = decode_job(value)
    if not is_job_id(job.job_id):
        raise InvalidRequest(
            f"job_id {job.job_id[:64]!r} is no job ID; it must be {JOB_ID_LENGTH} hex digits in "
            "lower case"
        )
    return job
