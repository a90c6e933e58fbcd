"""Background tasks end, whatever becomes of a cancel."""

from __future__ import annotations

import asyncio

import pytest

from gateway.tasks import end_tasks


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.tasks.AGAIN_S", 0.01)


def test_a_cancel_that_wait_for_drops_is_said_again() -> None:
    async def main() -> None:
        calls: list[asyncio.Future[None]] = []

        async def work() -> None:
            while True:
                calls.append(asyncio.get_running_loop().create_future())
                await asyncio.wait_for(calls[-1], 60)

        task = asyncio.create_task(work())
        while not calls:
            await asyncio.sleep(0)
        calls[-1].set_result(None)  # and it is cancelled before it hears of that
        await asyncio.wait_for(end_tasks([task]), 20)
        assert task.cancelled()

    asyncio.run(main())


def test_all_have_ended_and_a_failure_keeps_none_from_it() -> None:
    async def main() -> None:
        async def fail() -> None:
            raise ValueError("broken")

        tasks = [asyncio.create_task(work) for work in (fail(), asyncio.sleep(60))]
        await asyncio.sleep(0)
        await end_tasks(tasks)
        assert all(task.done() for task in tasks)
        assert isinstance(tasks[0].exception(), ValueError)
        await end_tasks([])

    asyncio.run(main())
