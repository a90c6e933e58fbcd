"""The picture of a running batch."""

import io

import pytest
from rich.console import Console

from openlora.commands import batch_progress
from openlora.commands.batch_progress import Rates, picture, summary, watch
from openlora.errors import SetupError


def batch(status="in_progress", **progress):
    return {
        "id": "batch_1",
        "status": status,
        "request_counts": {"total": 1000, "completed": 390, "failed": 10},
        "progress": {
            "lines_done": 400,
            "completion_tokens": 8000,
            "problem": None,
            "bytes_read": 50,
            "bytes": 100,
            **progress,
        },
    }


def shown(*args, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(picture(*args))
    return console.file.getvalue()


def test_speed_and_time_left_come_from_the_last_polls():
    rates = Rates()
    assert rates.per_second() == (0.0, 0.0)
    for second in range(100):
        rates.add(second, 4 * second, 80 * second)
    assert rates.per_second() == (4.0, 80.0)
    text = shown(batch(), {"pirate": 300, "": 100}, rates)
    assert "400 of 1,000 lines · 4 lines/s, 80 tokens/s · 2 min 30 s left · 10 failed" in text
    assert "pirate" in text
    assert "(base model)" in text


def test_all_of_it_is_seen_on_a_narrow_terminal():
    rates = Rates()
    for second in range(10):
        rates.add(second, 4 * second, 80 * second)
    rows = [row.strip() for row in shown(batch(), {}, rates, width=60).splitlines()]
    assert set(rows[1]) == {"━"}
    facts = "400 of 1,000 lines · 4 lines/s, 80 tokens/s · 2 min 30 s left · 10 failed"
    assert " ".join(rows[2:]) == facts


def test_many_adapters_are_summed_up():
    text = shown(batch(), {f"a{n}": n for n in range(1, 101)}, Rates())
    assert "a100" in text
    assert "92 more" in text
    assert "4,278" in text


def test_what_holds_a_batch_up_is_shown():
    stuck = batch(problem="the disk is full")
    assert "waiting: the disk is full" in shown(stuck, {}, Rates())
    assert summary(stuck).startswith("in_progress  400/1000 lines  10 failed  8000 tokens")
    assert "waiting: the disk is full" in summary(stuck)


class Gateway:
    """Answers with what it is told to, or is away."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def get(self, path):
        assert path == "/v1/batches/batch_1"
        answer = self.answers.pop(0)
        if answer is None:
            raise SetupError("no OpenLoRA answers")
        return answer


def test_a_gateway_that_is_started_anew_is_waited_for(monkeypatch):
    monkeypatch.setattr(batch_progress, "POLL_S", 0.0)
    gateway = Gateway(batch(), batch(), None, None, batch(), batch("completed"))
    assert watch(gateway.get, "batch_1")["status"] == "completed"
    with pytest.raises(SetupError):
        watch(Gateway(None, batch("completed")).get, "batch_1")
    monkeypatch.setattr(batch_progress, "PATIENCE_S", 0.0)
    with pytest.raises(SetupError):
        watch(Gateway(batch(), *[None] * 1000).get, "batch_1")
