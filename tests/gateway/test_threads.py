"""Blocking calls in daemon threads: whoever asked hears of everything."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gateway.threads import in_daemon_thread
from openlora.errors import SetupError


def test_result_and_errors_of_any_kind_come_back() -> None:
    def fail(error: Exception) -> None:
        raise error

    async def main() -> None:
        assert await in_daemon_thread(lambda: threading.current_thread().daemon)
        with pytest.raises(SetupError):
            await in_daemon_thread(lambda: fail(SetupError("no broker")))
        with pytest.raises(RuntimeError, match="closed"):
            await in_daemon_thread(lambda: fail(RuntimeError("closed")))

    asyncio.run(main())


def test_who_asked_may_give_up_and_nobody_waits_for_the_call() -> None:
    release = threading.Event()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_daemon_thread(lambda: release.wait(60)), 0.05)

    asyncio.run(main())  # ends although the call has not
    release.set()
