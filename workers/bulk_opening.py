"""Messages of the batch topic become bundles whose lines can run, or end here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from openlora.adapters.stores import Store
from openlora.errors import AdapterFailed, InvalidRequest, OpenLoRAError
from openlora.joblog.crashes import Suspicion
from openlora.protocol.bulk import BulkAnswer, BulkLine, BulkMessage, decode_bulk_message
from workers.backlog import Fetched
from workers.bulk_bundles import Bundle
from workers.dead_letters import DeadLetters
from workers.engine_client import EngineClient
from workers.offsets import Position

HeldAgainst = tuple[Mapping[int, Suspicion], Mapping[str, str]]
"""A bundle's lines that crashed engines had inside; its quarantined adapters, with the reason."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A bundle and its lines.

    Attributes:
        lines: run as there is room.
        suspects: run alone first.
        answers: of lines that are not run.
    """

    bundle: Bundle
    lines: list[BulkLine]
    suspects: list[tuple[BulkLine, Suspicion]]
    answers: list[BulkAnswer]


@dataclass(frozen=True, slots=True)
class BundleOpener:
    """Used by the loop's thread alone.

    Attributes:
        end_position: the message needs nothing more; may be called by any thread.
        held_against: asks for what is known of a bundle's lines and adapters.
        brings_tokens: whether an adapter has other tokens than the model.
    """

    worker_id: str
    engine: EngineClient
    adapters: Store
    dead_letters: DeadLetters
    end_position: Callable[[Position], None]
    held_against: Callable[[BulkMessage], HeldAgainst]
    brings_tokens: Callable[[Path], bool] = lambda path: False

    def open(self, fetched: Fetched, stopped: Collection[str]) -> Opened | None:
        """What is to be done with a message; None: nothing any more.

        ``stopped``: batches that nobody wants.
        """
        try:
            message = decode_bulk_message(fetched.value)
        except InvalidRequest as error:
            self.dead_letters.write(fetched, error.code, error.message)
            return None
        if message.batch_id in stopped or not message.lines:
            self.end_position(fetched.position)
            return None
        bundle = Bundle(fetched, message)
        suspicions, quarantined = self.held_against(message)
        self._register_adapters(bundle)
        bundle.refuse_quarantined(quarantined)
        opened = Opened(bundle, [], [], [])
        for line in message.lines:
            suspicion = suspicions.get(line.line)
            if suspicion is None:
                opened.lines.append(line)
            elif suspicion.is_deadly:
                opened.answers.append(bundle.condemn(line, suspicion, self.worker_id))
            else:
                opened.suspects.append((line, suspicion))
        return opened

    def _register_adapters(self, bundle: Bundle) -> None:
        try:
            for adapter in bundle.message.group.adapters:
                path = self.adapters.path(adapter.hash)
                self._check_tokenizer(adapter.id, path)
                self.engine.register(adapter.hash, str(path))
        except OpenLoRAError as error:
            bundle.failure = error

    def _check_tokenizer(self, adapter_id: str, path: Path) -> None:
        if self.brings_tokens(path):
            raise AdapterFailed(
                f"adapter {adapter_id!r} brings tokens of its own, which batches do not serve; "
                "send its requests one by one"
            )
