"""The end of tasks that run until they are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

AGAIN_S = 1.0


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels ``tasks``, and returns once all of them have ended; their errors are not raised.

    One cancel does not do. Before Python 3.12, ``asyncio.wait_for`` drops one that comes at the
    moment at which its call returns, and redis-py sends each command within one.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
