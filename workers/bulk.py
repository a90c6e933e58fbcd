"""Bundles of lines on this worker: run in the room that interactive work leaves.

A bundle's lines go to the engine as there is room, under priority "batch", and their answers leave
together. Nothing of it is in the job log: a bundle is ended in Kafka once the broker has its
answers, and run again where its worker died before.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from openlora.adapters.stores import Store
from openlora.errors import DeadlineExceeded, InvalidRequest, OpenLoRAError, PromptTooLong
from openlora.protocol.bulk import (
    BULK_PREFIX,
    BulkAnswer,
    BulkLine,
    BulkMessage,
    decode_bulk_message,
    line_job_id,
    seed_of,
)
from openlora.protocol.events import Failure, FinishReason
from workers.backlog import Fetched
from workers.bulk_lines import LineRun, answer_messages
from workers.bulk_outlet import BulkOutlet
from workers.bulk_pace import Pace
from workers.dead_letters import DeadLetters
from workers.engine_client import EngineClient
from workers.messages import ModelFacts, Output, Start, StepOutputs
from workers.offsets import Position
from workers.run import failure_of, now_ms
from workers.tokenizer import PromptTokenizer

ADMIT_AT_ONCE = 128
ADMIT_BESIDE_INTERACTIVE = 8
"""Lines admitted in one turn of the loop: each keeps the tokens of others waiting for 0.1 ms."""
ABOUT_S = 30.0
"""Interactive work counts as being about for so long after it was last there."""
SPARE_SEATS = 8
"""One seat of the engine in so many stays free for interactive jobs while they are about; while
none is, as many lines wait at the engine for a seat, so that none is empty for a step."""
UPKEEP_S = 1.0

logger = logging.getLogger("workers.bulk")


def is_bundle(fetched: Fetched) -> bool:
    """Whether a message of the batch topic is a bundle; else it is a single job."""
    return fetched.value.startswith(BULK_PREFIX)


@dataclass(slots=True, eq=False)
class _Bundle:
    fetched: Fetched
    message: BulkMessage
    answers: list[BulkAnswer] = field(default_factory=list)
    failure: OpenLoRAError | None = None  # of its adapters, and so of every line
    dropped: bool = False


class BulkLane:
    """All bundles of this worker. ``deliver`` may be called by any thread, all else by the loop's.

    Args:
        budget: about as many lines are in the engine at once; fewer where it has fewer seats.
        owns: whether a message's partition is still ours.
        end_position: the message needs nothing more; may be called by any thread.
        next_ticket: a number never used before.
    """

    def __init__(
        self,
        worker_id: str,
        engine: EngineClient,
        outlet: BulkOutlet,
        dead_letters: DeadLetters,
        adapters: Store,
        *,
        budget: int,
        owns: Callable[[Position], bool],
        end_position: Callable[[Position], None],
        next_ticket: Callable[[], int],
    ) -> None:
        self.outlet = outlet
        self._worker_id = worker_id
        self._engine = engine
        self._dead_letters = dead_letters
        self._adapters = adapters
        self._budget = budget
        self._spare = 0
        self._owns = owns
        self._end_position = end_position
        self._next_ticket = next_ticket
        self._inbox: deque[Fetched] = deque()
        self._bundles: set[_Bundle] = set()
        self._waiting: deque[tuple[_Bundle, BulkLine]] = deque()
        self._runs: dict[int, tuple[_Bundle, LineRun]] = {}
        self._upkeep_due = 0.0
        self._interactive_until = 0.0
        self._pace = Pace()
        self._tokenizer: PromptTokenizer | None = None
        self._facts: ModelFacts | None = None
        self.tokens_made = 0

    def prepare(self, tokenizer: PromptTokenizer, facts: ModelFacts) -> None:
        """Model and tokenizer are loaded; once, before the first turn."""
        self._tokenizer, self._facts = tokenizer, facts
        self._spare = min(self._budget, facts.max_num_seqs) // SPARE_SEATS
        self._budget = min(self._budget, facts.max_num_seqs)

    @property
    def lines_in_engine(self) -> int:
        """How many the engine has now."""
        return len(self._runs)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._inbox or self._bundles)

    def could_admit(self, interactive: int) -> bool:
        """Whether lines wait and there is room for one."""
        return bool(self._waiting or self._inbox) and self._has_room(interactive)

    def deliver(self, bundles: Iterable[Fetched]) -> None:
        """Bundles to run. Thread-safe."""
        self._inbox.extend(bundles)

    def drop_all(self) -> None:
        """Leave everything to the next owner: its offsets stay open."""
        self._inbox.clear()
        for bundle in list(self._bundles):
            self._drop(bundle)

    def take(self, steps: Sequence[StepOutputs]) -> None:
        """The engine's news; of interactive runs' nothing is done here."""
        self._pace.step(len(steps), time.monotonic())
        runs = self._runs
        for step in steps:
            for output in step.outputs:
                found = runs.get(output.ticket)
                if found is not None:
                    self._take(*found, output)

    def refill(self, interactive: int) -> None:
        """Admit lines into the room that ``interactive`` runs leave, a few at a time."""
        if interactive:
            self._interactive_until = time.monotonic() + ABOUT_S
        for _ in range(ADMIT_BESIDE_INTERACTIVE if interactive else ADMIT_AT_ONCE):
            if not self._has_room(interactive):
                break
            if not self._waiting and not self._open_next():
                break
            bundle, line = self._waiting.popleft()
            if not bundle.dropped:
                self._start(bundle, line)
        if time.monotonic() >= self._upkeep_due:
            self._upkeep()

    def _has_room(self, interactive: int) -> bool:
        if self._pace.room <= 0 and self._runs:
            return False
        if time.monotonic() >= self._interactive_until:
            return len(self._runs) < self._budget + self._spare
        return len(self._runs) < self._budget - self._spare - interactive

    def _open_next(self) -> bool:
        """Open bundles until one has lines to run; False where none is left."""
        while self._inbox:
            fetched = self._inbox.popleft()
            try:
                message = decode_bulk_message(fetched.value)
            except InvalidRequest as error:
                self._dead_letters.write(fetched, error.code, error.message)
                continue
            if message.batch_id in self.outlet.stopped or not message.lines:
                self._end_position(fetched.position)
                continue
            bundle = _Bundle(fetched, message)
            self._register_adapters(bundle)
            self._bundles.add(bundle)
            self._waiting.extend((bundle, line) for line in message.lines)
            return True
        return False

    def _register_adapters(self, bundle: _Bundle) -> None:
        try:
            for adapter in bundle.message.group.adapters:
                self._engine.register(adapter.hash, str(self._adapters.path(adapter.hash)))
        except OpenLoRAError as error:
            bundle.failure = error

    def _start(self, bundle: _Bundle, line: BulkLine) -> None:
        assert self._tokenizer is not None
        assert self._facts is not None
        message = bundle.message
        prompt_tokens = 0
        try:
            if now_ms() >= message.deadline_ms:
                raise DeadlineExceeded("the batch expired before the line was run")
            token_ids = self._tokenizer.encode(line)
            prompt_tokens = len(token_ids)
            if prompt_tokens >= self._facts.max_model_len:
                raise PromptTooLong(
                    f"the prompt has {prompt_tokens} tokens and the model's context holds "
                    f"{self._facts.max_model_len}; shorten it"
                )
            seed = seed_of(line_job_id(message.batch_id, message.input_hash, line.line))
            params = line.params.sampling(seed)
            if bundle.failure is not None:
                raise bundle.failure
        except OpenLoRAError as error:
            failure = failure_of(error)
            answer = BulkAnswer(
                line.line, line.custom_id, prompt_tokens=prompt_tokens, failure=failure
            )
            self._add(bundle, answer)
            return
        self._pace.join(prompt_tokens)
        ticket = self._next_ticket()
        run = LineRun(line, prompt_tokens, self._tokenizer.backend, self._facts.eos_token_ids)
        self._runs[ticket] = (bundle, run)
        self._engine.start(
            Start(
                ticket=ticket,
                prompt_token_ids=tuple(token_ids),
                params=params,
                adapters=_weights(message),
                priority="batch",
            )
        )

    def _take(self, bundle: _Bundle, run: LineRun, output: Output) -> None:
        reason: FinishReason | None = None
        if output.token_id is not None:
            self.tokens_made += 1
            reason = run.take(output.token_id)
        in_engine = output.finish_reason is None and output.fault is None
        if reason is None and in_engine:
            return
        if in_engine:
            self._engine.abort(output.ticket)
        del self._runs[output.ticket]
        if not self._runs:
            self._pace.rest()
        assert self._tokenizer is not None
        assert self._facts is not None
        fault = output.fault
        failure = None if fault is None else Failure(fault.code, fault.message)
        reason = reason or output.finish_reason  # type: ignore[assignment]
        tokenizer, eos_token_ids = self._tokenizer.backend, self._facts.eos_token_ids
        self._add(bundle, run.answer(reason, failure, tokenizer, eos_token_ids))

    def _add(self, bundle: _Bundle, answer: BulkAnswer) -> None:
        bundle.answers.append(answer)
        if len(bundle.answers) < len(bundle.message.lines):
            return
        self._bundles.discard(bundle)
        if not self._bundles:
            self.outlet.watched = frozenset()
        position = bundle.fetched.position
        self.outlet.write(
            answer_messages(bundle.message, bundle.answers, self._worker_id),
            lambda: self._end_position(position),
        )

    def _upkeep(self) -> None:
        """Once a second: let go what nobody wants, or what another worker has now."""
        self._upkeep_due = time.monotonic() + UPKEEP_S
        self.outlet.watched = frozenset(bundle.message.batch_id for bundle in self._bundles)
        if self._bundles:
            self.outlet.start()
        for bundle in list(self._bundles):
            if bundle.message.batch_id in self.outlet.stopped:
                self._drop(bundle)
                self._end_position(bundle.fetched.position)
            elif not self._owns(bundle.fetched.position):
                self._drop(bundle)

    def _drop(self, bundle: _Bundle) -> None:
        bundle.dropped = True
        self._bundles.discard(bundle)
        for ticket, (owner, _) in list(self._runs.items()):
            if owner is bundle:
                self._engine.abort(ticket)
                del self._runs[ticket]
        if not self._runs:
            self._pace.rest()


def _weights(message: BulkMessage) -> tuple[tuple[str, float], ...]:
    """(content hash, weight); two adapters of equal content are one with the sum of weights."""
    weights: dict[str, float] = {}
    for adapter in message.group.adapters:
        weights[adapter.hash] = weights.get(adapter.hash, 0.0) + adapter.weight
    return tuple(weights.items())
