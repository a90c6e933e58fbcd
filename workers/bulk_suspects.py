"""Lines of bundles that were in an engine when it crashed: run alone, one after the other.

As with jobs (ward.py), only one of them did it. But a job is watched by somebody and a line is
not: suspected lines wait until no interactive job is there, unless that takes too long. A line that
has made enough tokens alone is run from its start among the others again: lines keep no log.
"""

from __future__ import annotations

import logging
import time
from collections import deque

from openlora.joblog.crashes import Suspicion
from openlora.protocol.bulk import BulkLine
from workers.bulk_bundles import Bundle
from workers.ward import trial_tokens

PATIENCE_S = 2.0
"""After so long without a trial the next one begins beside interactive jobs, which wait for it."""

logger = logging.getLogger("workers.bulk_suspects")

_Suspect = tuple[Bundle, BulkLine, Suspicion]


class LineSuspects:
    """Who is tried next, and how far the trial is; used by the loop's thread alone.

    Attributes:
        trial: ticket of the line that runs alone now; None where none does.
    """

    def __init__(self) -> None:
        self.trial: int | None = None
        self._waiting: deque[_Suspect] = deque()
        self._tried: _Suspect | None = None
        self._tokens_left: float = 0
        self._waits_since = 0.0

    def __bool__(self) -> bool:
        """Whether somebody is on trial or waits for it."""
        return self.trial is not None or bool(self._waiting)

    @property
    def is_overdue(self) -> bool:
        """Whether a trial has to begin now, whoever else is there."""
        has_waited = time.monotonic() - self._waits_since >= PATIENCE_S
        return self.trial is None and bool(self._waiting) and has_waited

    def add(self, bundle: Bundle, line: BulkLine, suspicion: Suspicion) -> None:
        """A line to be tried."""
        if not self:
            self._waits_since = time.monotonic()
        self._waiting.append((bundle, line, suspicion))

    def next(self) -> _Suspect | None:
        """Who is to be tried now; None where nobody waits."""
        return self._waiting.popleft() if self._waiting else None

    def drop(self, bundle: Bundle) -> None:
        """None of the bundle's lines waits any more."""
        self._waiting = deque(suspect for suspect in self._waiting if suspect[0] is not bundle)

    def begin(self, ticket: int, bundle: Bundle, line: BulkLine, suspicion: Suspicion) -> None:
        """The line has been started, alone."""
        self.trial = ticket
        self._tried = bundle, line, suspicion
        self._tokens_left = trial_tokens(suspicion)
        logger.warning(
            "event=suspect_tried batch=%s line=%d crashes=%d alone=%d next=run_alone",
            *(bundle.batch_id, line.line, suspicion.crashes, suspicion.alone),
        )

    def take_token(self, ticket: int) -> bool:
        """The line on trial made a token; whether that was the last one to make alone."""
        if ticket != self.trial:
            return False
        self._tokens_left -= 1
        return self._tokens_left <= 0

    def put_back(self, ticket: int) -> bool:
        """A line is taken out of the engine; where it was on trial, it is the next to be tried."""
        if ticket != self.trial or self._tried is None:
            return False
        self._waiting.appendleft(self._tried)
        return True

    def leave(self, ticket: int) -> None:
        """A line has left the engine; where it was on trial, that is over."""
        if ticket == self.trial:
            self.trial = self._tried = None
            self._waits_since = time.monotonic()
