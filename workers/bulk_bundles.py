"""A bundle on its way through this worker, and what its lines start with. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from openlora.errors import AdapterFailed, DeadlineExceeded, OpenLoRAError
from openlora.joblog.crashes import Suspicion
from openlora.protocol.bulk import (
    BULK_PREFIX,
    BulkAnswer,
    BulkLine,
    BulkMessage,
    line_job_id,
    seed_of,
)
from openlora.protocol.codec import encode
from openlora.sampling_params import SamplingParams
from workers.backlog import Fetched
from workers.dead_letters import condemned, letter_of
from workers.messages import ModelFacts, Start, weights_of
from workers.run import failure_of, now_ms
from workers.tokenizer import PromptTokenizer


def is_bundle(fetched: Fetched) -> bool:
    """Whether a message of the batch topic is a bundle; else it is a single job."""
    return fetched.value.startswith(BULK_PREFIX)


@dataclass(slots=True, eq=False)
class Bundle:
    """A message of lines; it ends when every line has its answer, or is dropped.

    ``prompts``: of its long lines those that were read, by line: token IDs, or why there are none.
    """

    fetched: Fetched
    message: BulkMessage
    answers: list[BulkAnswer] = field(default_factory=list)
    letters: list[bytes] = field(default_factory=list)
    prompts: dict[int, list[int] | Exception] = field(default_factory=dict)
    failure: OpenLoRAError | None = None  # of its adapters, and so of every line

    @property
    def batch_id(self) -> str:
        """The batch whose lines these are."""
        return self.message.batch_id

    @property
    def is_complete(self) -> bool:
        """Whether every line has its answer."""
        return len(self.answers) >= len(self.message.lines)

    def refuse_quarantined(self, quarantined: Mapping[str, str]) -> None:
        """Fail all lines where an adapter is among these (content hash → reason)."""
        for adapter in self.message.group.adapters:
            if adapter.hash in quarantined:
                self.failure = AdapterFailed(quarantined[adapter.hash])

    def job_id(self, line: int) -> str:
        """Of a line."""
        return line_job_id(self.batch_id, self.message.input_hash, line)

    def refusal(self, line: BulkLine, error: OpenLoRAError, prompt_tokens: int = 0) -> BulkAnswer:
        """The answer to a line that is not run."""
        failure = failure_of(error)
        return BulkAnswer(line.line, line.custom_id, prompt_tokens=prompt_tokens, failure=failure)

    def condemn(self, line: BulkLine, suspicion: Suspicion, worker_id: str) -> BulkAnswer:
        """The answer to a line that would only end the engine once more; notes a letter of it."""
        error = condemned(suspicion)
        one = encode(msgspec.structs.replace(self.message, lines=(line,)))
        fetched = Fetched(self.fetched.position, self.fetched.key, one)
        job_id = self.job_id(line.line)
        story = suspicion.story
        self.letters.append(letter_of(fetched, worker_id, error.code, error.message, job_id, story))
        return self.refusal(line, error)

    def params(self, line: BulkLine) -> SamplingParams:
        """Of a line; one that names no seed has the same whenever and wherever it is run."""
        return line.params.sampling(seed_of(self.job_id(line.line)))

    def start(self, ticket: int, line: BulkLine, prompt_token_ids: list[int]) -> Start:
        """What the engine is told."""
        return Start(
            ticket=ticket,
            prompt_token_ids=tuple(prompt_token_ids),
            params=self.params(line),
            adapters=weights_of(self.message.group.adapters),
            priority="batch",
        )


def prompt_of(
    bundle: Bundle, line: BulkLine, tokenizer: PromptTokenizer, facts: ModelFacts
) -> list[int]:
    """The token IDs of a line's prompt.

    Raises:
        OpenLoRAError: why the line cannot be run.
    """
    if now_ms() >= bundle.message.deadline_ms:
        raise DeadlineExceeded("the batch expired before the line was run")
    given = bundle.prompts.get(line.line)
    if isinstance(given, Exception):
        raise given
    token_ids = tokenizer.encode(line) if given is None else given
    facts.check_length(len(token_ids))
    if bundle.failure is not None:
        raise bundle.failure
    bundle.params(line)
    return token_ids
