"""Bundles of lines on this worker: run in the room that interactive work leaves.

A bundle's lines go to the engine as there is room, under priority "batch", and their answers leave
together. Nothing of it is in the job log: a bundle is ended in Kafka once the broker has its
answers, and run again where its worker died before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from openlora.errors import OpenLoRAError
from openlora.joblog.crashes import Suspicion
from openlora.protocol.bulk import BulkAnswer, BulkLine
from openlora.protocol.events import Failure, FinishReason
from workers.adapter_tokenizers import AdapterTokenizers
from workers.backlog import Fetched
from workers.bulk_bundles import Bundle, is_bundle, prompt_of
from workers.bulk_lines import LineRun, answer_messages
from workers.bulk_opening import BundleOpener
from workers.bulk_outlet import BulkOutlet
from workers.bulk_suspects import LineSuspects
from workers.engine_client import EngineClient
from workers.messages import ModelFacts, Output, StepOutputs
from workers.offsets import Position
from workers.reading import Reader, is_long
from workers.tokenizer import PromptTokenizer

ADMIT_AT_ONCE = 32
ADMIT_BESIDE_INTERACTIVE = 8
"""Lines admitted in one turn of the loop: each keeps the tokens of others waiting for 0.1 ms."""
ABOUT_S = 30.0
"""Interactive work counts as being about for so long after it was last there."""
SPARE_SEATS = 8
"""One seat of the engine in so many stays free for interactive jobs while they are about."""
AHEAD_SHARE = 2
"""While none is, one line for so many seats waits at the engine: no seat is empty for a step."""
UPKEEP_S = 1.0

_Line = tuple[Bundle, BulkLine, Suspicion | None]


class BulkLane:
    """All bundles of this worker. ``deliver`` may be called by any thread, all else by the loop's.

    Args:
        budget: about as many lines are in the engine at once; fewer where it has fewer seats.
        owns: whether a message's partition is still ours.
        next_ticket: a number never used before.
        others_inside: whether the engine has anything but lines.
    """

    def __init__(
        self,
        engine: EngineClient,
        opener: BundleOpener,
        outlet: BulkOutlet,
        *,
        budget: int,
        owns: Callable[[Position], bool],
        next_ticket: Callable[[], int],
        others_inside: Callable[[], bool],
    ) -> None:
        self.outlet = outlet
        self._engine = engine
        self._opener = opener
        self._budget = budget
        self._spare = self._ahead = 0
        self._owns = owns
        self._next_ticket = next_ticket
        self._others_inside = others_inside
        self._suspects = LineSuspects()
        self._inbox: deque[Fetched] = deque()
        self._bundles: set[Bundle] = set()
        self._waiting: deque[tuple[Bundle, BulkLine]] = deque()
        self._runs: dict[int, tuple[Bundle, LineRun]] = {}
        self._upkeep_due = 0.0
        self._interactive_until = 0.0
        self._tokenizer: PromptTokenizer | None = None
        self._tokenizers: AdapterTokenizers | None = None
        self._facts: ModelFacts | None = None
        self._reader: Reader[_Line] | None = None
        self.tokens_made = 0

    def prepare(
        self,
        tokenizer: PromptTokenizer,
        facts: ModelFacts,
        tokenizers: AdapterTokenizers,
        reader: Reader[_Line],
    ) -> None:
        """Model and tokenizer are loaded; once, before the first turn. ``reader``: of long ones."""
        self._tokenizer, self._facts = tokenizer, facts
        self._tokenizers, self._reader = tokenizers, reader
        self._budget = min(self._budget, facts.max_num_seqs)
        self._spare, self._ahead = self._budget // SPARE_SEATS, self._budget // AHEAD_SHARE

    def brings_tokens(self, adapter: Path) -> bool:
        """Whether the adapter of this directory has other tokens than the model.

        Raises:
            AdapterFailed: its tokenizer cannot be read.
        """
        assert self._tokenizers is not None
        return self._tokenizers.of((adapter,)).prompt is not self._tokenizer

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
        if self._suspects:
            return not (self._runs or self._others_inside())
        return bool(self._waiting or self._inbox) and self._has_room(interactive)

    @property
    def is_on_trial(self) -> bool:
        """Whether nothing else may be in the engine, for the sake of a suspected line.

        Jobs are not held before the lines beside it have ended: those make whole answers.
        """
        if self._suspects.trial is not None:
            return True
        return not self._runs and self._suspects.is_overdue

    def inside(self) -> dict[Bundle, list[int]]:
        """The lines that the engine has now, or had when it died."""
        found: dict[Bundle, list[int]] = {}
        for bundle, run in self._runs.values():
            found.setdefault(bundle, []).append(run.line.line)
        return found

    def deliver(self, messages: Iterable[Fetched]) -> list[Fetched]:
        """Take the bundles among these to run; returns the others. Thread-safe."""
        others = []
        for fetched in messages:
            if is_bundle(fetched):
                self._inbox.append(fetched)
            else:
                others.append(fetched)
        return others

    def drop_all(self) -> None:
        """Leave everything to the next owner: its offsets stay open."""
        self._inbox.clear()
        for bundle in list(self._bundles):
            self._drop(bundle)

    def step_aside(self) -> int:
        """Take all lines out of the engine, to be run from their start later; how many those are.

        Jobs that wait meanwhile are watched by somebody, and a line's answer may take minutes.
        """
        inside = list(self._runs.items())
        for ticket, (bundle, run) in reversed(inside):
            self._engine.abort(ticket)
            if not self._suspects.put_back(ticket):
                self._waiting.appendleft((bundle, run.line))
            self._forget(ticket)
        return len(inside)

    def take(self, steps: Sequence[StepOutputs]) -> None:
        """The engine's news; of interactive runs' nothing is done here."""
        runs = self._runs
        if not runs:
            return
        for step in steps:
            for output in step.outputs:
                found = runs.get(output.ticket)
                if found is not None:
                    self._take(*found, output)

    def refill(self, interactive: int) -> None:
        """Admit lines into the room that ``interactive`` runs leave, a few at a time."""
        self._take_read()
        if interactive:
            self._interactive_until = time.monotonic() + ABOUT_S
        for _ in range(ADMIT_BESIDE_INTERACTIVE if interactive else ADMIT_AT_ONCE):
            # A suspect needs no room but the whole engine, which held jobs have left to it.
            if not (self._suspects or (self._has_room(interactive) and self._is_line_there())):
                break
            if self._suspects:
                self._try_suspect()
                break
            self._start(*self._waiting.popleft())
        if time.monotonic() >= self._upkeep_due:
            self._upkeep()

    def _has_room(self, interactive: int) -> bool:
        if time.monotonic() >= self._interactive_until:
            return len(self._runs) < self._budget + self._ahead
        return len(self._runs) < self._budget - self._spare - interactive

    def _is_line_there(self) -> bool:
        while not (self._waiting or self._suspects):
            if not self._inbox:
                return False
            self._open(self._inbox.popleft())
        return True

    def _open(self, fetched: Fetched) -> None:
        opened = self._opener.open(fetched, self.outlet.stopped)
        if opened is None:
            return
        bundle = opened.bundle
        self._bundles.add(bundle)
        for line in opened.lines:
            self._queue(bundle, line, None)
        for line, suspicion in opened.suspects:
            self._queue(bundle, line, suspicion)
        for answer in opened.answers:
            self._add(bundle, answer)

    def _queue(self, bundle: Bundle, line: BulkLine, suspicion: Suspicion | None) -> None:
        """A line to be run once its prompt is known: a long one is read beside the loop."""
        assert self._reader is not None
        assert self._tokenizer is not None
        if is_long(line) and line.line not in bundle.prompts:
            self._reader.begin((bundle, line, suspicion), "", self._tokenizer, line)
        elif suspicion is None:
            self._waiting.append((bundle, line))
        else:
            self._suspects.add(bundle, line, suspicion)

    def _take_read(self) -> None:
        assert self._reader is not None
        for (bundle, line, suspicion), answer in self._reader.finished():
            if bundle in self._bundles:
                bundle.prompts[line.line] = answer
                self._queue(bundle, line, suspicion)

    def _try_suspect(self) -> None:
        """Start the next suspected line once the engine is empty."""
        if self._runs or self._others_inside():
            return
        found = self._suspects.next()
        if found is not None:
            bundle, line, suspicion = found
            ticket = self._start(bundle, line)
            if ticket is not None:
                self._suspects.begin(ticket, bundle, line, suspicion)

    def _start(self, bundle: Bundle, line: BulkLine) -> int | None:
        """The line's ticket; None where it could not be started, and has its answer."""
        assert self._tokenizer is not None
        assert self._facts is not None
        try:
            token_ids = prompt_of(bundle, line, self._tokenizer, self._facts)
        except OpenLoRAError as error:
            self._add(bundle, bundle.refusal(line, error))
            return None
        ticket = self._next_ticket()
        run = LineRun(line, len(token_ids), self._tokenizer.backend, self._facts.eos_token_ids)
        self._runs[ticket] = (bundle, run)
        self._engine.start(bundle.start(ticket, line, token_ids))
        return ticket

    def _take(self, bundle: Bundle, run: LineRun, output: Output) -> None:
        reason: FinishReason | None = None
        is_cleared = False
        if output.token_id is not None:
            self.tokens_made += 1
            reason = run.take(output)
            is_cleared = self._suspects.take_token(output.ticket)
        in_engine = output.finish_reason is None and output.fault is None
        if reason is None and in_engine and not is_cleared:
            return
        if in_engine:
            self._engine.abort(output.ticket)
        self._forget(output.ticket)
        if is_cleared and reason is None and in_engine:
            self._waiting.append((bundle, run.line))
            return
        assert self._tokenizer is not None
        assert self._facts is not None
        fault = output.fault
        failure = None if fault is None else Failure(fault.code, fault.message)
        reason = reason or output.finish_reason  # type: ignore[assignment]
        tokenizer, eos_token_ids = self._tokenizer.backend, self._facts.eos_token_ids
        self._add(bundle, run.answer(reason, failure, tokenizer, eos_token_ids))

    def _forget(self, ticket: int) -> None:
        del self._runs[ticket]
        self._suspects.leave(ticket)

    def _add(self, bundle: Bundle, answer: BulkAnswer) -> None:
        bundle.answers.append(answer)
        if not bundle.is_complete:
            return
        self._end(bundle)
        position = bundle.fetched.position
        self.outlet.write(
            answer_messages(bundle.message, bundle.answers, self._opener.worker_id),
            bundle.letters,
            lambda: self._opener.end_position(position),
        )

    def _end(self, bundle: Bundle) -> None:
        self._bundles.discard(bundle)
        if not self._bundles:
            self.outlet.watched = frozenset()

    def _upkeep(self) -> None:
        """Once a second: let go what nobody wants, or what another worker has now."""
        self._upkeep_due = time.monotonic() + UPKEEP_S
        self.outlet.watched = frozenset(bundle.message.batch_id for bundle in self._bundles)
        if self._bundles:
            self.outlet.start()
        for bundle in list(self._bundles):
            if bundle.message.batch_id in self.outlet.stopped:
                self._drop(bundle)
                self._opener.end_position(bundle.fetched.position)
            elif not self._owns(bundle.fetched.position):
                self._drop(bundle)

    def _drop(self, bundle: Bundle) -> None:
        self._end(bundle)
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not bundle)
        self._suspects.drop(bundle)
        for ticket, (owner, _) in list(self._runs.items()):
            if owner is bundle:
                self._engine.abort(ticket)
                self._forget(ticket)
