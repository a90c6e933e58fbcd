"""Keeps the parts of one system alive, and ends them in order.

Order of shutdown, and why:
1. the gateway: it takes no new work and lets the open streams finish, for which it needs all else;
2. the producer: it ends between two steps of a batch, and writes the answers it holds;
3. the workers: what still runs (batch jobs, streams over the gateway's time limit) ends or is
   left in its log for the next worker;
4. the broker, then Redis: a worker's last act is to commit offsets and to append to logs.
A second stop signal skips the waiting: everything is killed at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from openlora.commands.children import Part, how_it_ended, last_words
from openlora.commands.screen import LogFollower, Screen
from openlora.commands.signals import StopSignals
from openlora.errors import SetupError

FOLLOW_INTERVAL_S = 0.2
LONGEST_SLEEP_S = 60.0
DRAIN_SLACK_S = 10.0
"""How much longer than its own drain time-out a part may take to exit before it is killed."""


class Supervisor:
    """Starts, watches and stops parts, in the order they were given to ``start``."""

    def __init__(
        self, screen: Screen, signals: StopSignals, *, verbose: bool, drain_timeout_s: float
    ) -> None:
        self._screen = screen
        self._signals = signals
        self._exit_timeout_s = drain_timeout_s + DRAIN_SLACK_S
        self._parts: list[Part] = []
        self._follower = LogFollower(screen) if verbose else None

    def start(self, part: Part) -> None:
        """Start ``part`` and take it into care. Raises SetupError where it cannot start."""
        self._parts.append(part)
        if self._follower is not None:
            self._follower.add(part.name, part.log_path)
        part.start()
        part.backoff.started()

    def pause(self, timeout_s: float) -> None:
        """Wait for ``timeout_s`` or the next signal, showing logs meanwhile."""
        self._signals.wait(timeout_s)
        if self._follower is not None:
            self._follower.show_new()

    def fail_if_dead(self) -> None:
        """While the system starts, a part that dies ends the start.

        Raises:
            SetupError: what died, how, and its last words.
        """
        for part in self._parts:
            if not part.running:
                said = last_words(part.log_path, part.status)
                raise SetupError(
                    f"{part.name} {how_it_ended(part.status)} before the system was ready: "
                    f"{said or 'it logged nothing'} (log: {part.log_path})"
                )

    def run(self) -> None:
        """Restart what dies; returns at the first stop signal."""
        while not self._signals.stops:
            for part in self._parts:
                self._tend(part)
            self.pause(self._time_to_next_event())

    def _tend(self, part: Part) -> None:
        if part.running:
            return
        if part.backoff.restart_at is None:
            ended, said = how_it_ended(part.status), last_words(part.log_path, part.status)
            part.kill()  # what it had spawned
            wait_s = part.backoff.died()
            self._screen.warn(
                f"{part.name} {ended}{f' ({said})' if said else ''}; {part.consequence}; "
                f"it starts again in {wait_s:g} s (log: {part.log_path})"
            )
        elif part.backoff.restart_at <= time.monotonic():
            try:
                part.start()
            except SetupError as error:
                wait_s = part.backoff.died()
                self._screen.warn(f"{error.message}; next try in {wait_s:g} s")
            else:
                part.backoff.started()
                self._screen.line(f"{part.name} was started again")

    def _time_to_next_event(self) -> float:
        planned = [p.backoff.restart_at for p in self._parts if p.backoff.restart_at is not None]
        longest_s = LONGEST_SLEEP_S if self._follower is None else FOLLOW_INTERVAL_S
        return max(0.0, min([longest_s, *(at - time.monotonic() for at in planned)]))

    def stop(self, groups: Sequence[Sequence[Part]]) -> bool:
        """End all parts, one group after the other; returns whether all of them drained.

        False: a second stop signal, or a part over its time, cut the drain short.
        """
        self._signals.hold()
        orderly = True
        for group in groups:
            for part in group:
                part.terminate()
            orderly &= self._wait_for(group)
        for part in reversed(self._parts):
            part.kill()
        if self._follower is not None:
            self._follower.show_new()
        return orderly

    def _wait_for(self, group: Sequence[Part]) -> bool:
        deadline = time.monotonic() + self._exit_timeout_s
        while any(part.running for part in group):
            left_s = deadline - time.monotonic()
            if self._signals.stops > 1:
                return False
            if left_s <= 0:
                names = ", ".join(part.name for part in group if part.running)
                self._screen.warn(f"{names} did not stop in time and is killed")
                return False
            self.pause(min(left_s, FOLLOW_INTERVAL_S) if self._follower else left_s)
        return True
