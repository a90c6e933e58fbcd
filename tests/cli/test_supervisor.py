"""Supervision with real processes: restarts with back-off, order of shutdown, forced stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil
import pytest

from openlora.commands import children
from openlora.commands.children import Backoff, Child, how_it_ended, last_words
from openlora.commands.screen import Screen
from openlora.commands.signals import StopSignals
from openlora.commands.supervisor import Supervisor
from openlora.errors import SetupError

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True); time.sleep(600)"
)


@pytest.fixture
def make_child(tmp_path):
    made = []

    def make(name, code):
        child = Child(name, "its work goes on", [sys.executable, "-c", code], os.environ,
                      tmp_path / f"{name}.log")  # fmt: skip
        made.append(child)
        return child

    yield make
    for child in made:
        child.kill()


@pytest.fixture
def signals():
    with StopSignals() as stop_signals:
        yield stop_signals


def supervise(signals, **options):
    return Supervisor(Screen(), signals, **{"verbose": False, "drain_timeout_s": 5, **options})


def wait_for_log(child, text="up"):
    deadline = time.monotonic() + 20
    while text not in child.log_path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def after(delay_s, action):
    timer = threading.Timer(delay_s, action)
    timer.daemon = True
    timer.start()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_waits_double_and_a_steady_life_resets_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(children.time, "monotonic", lambda: now[0])
    backoff = Backoff()
    waits = []
    for _ in range(8):
        backoff.started()
        waits.append(backoff.died())
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
    backoff.started()
    assert backoff.restart_at is None
    now[0] += children.STEADY_AFTER_S + 1
    assert backoff.died() == 0.5
    assert backoff.restart_at == now[0] + 0.5


def test_a_dead_child_is_told_of_and_started_again(make_child, signals, capsys):
    child = make_child("worker", SLEEPER)
    supervisor = supervise(signals)
    supervisor.start(child)
    wait_for_log(child)
    signals.hold()
    first = psutil.Process(child._process.pid)
    after(0.2, first.kill)

    def interrupt_once_it_runs_again():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child._process.pid == first.pid:
            time.sleep(0.02)
        interrupt()

    after(0.2, interrupt_once_it_runs_again)
    supervisor.run()
    assert child.running
    assert child._process.pid != first.pid
    said = " ".join(capsys.readouterr().out.split())
    assert "worker was killed by SIGKILL; its work goes on; it starts again in 0.5 s" in said
    assert "worker was started again" in said


def test_a_death_before_all_is_ready_ends_the_start_with_its_last_words(make_child, signals):
    child = make_child("worker", "import sys; sys.exit('openlora: no such model')")
    supervisor = supervise(signals)
    supervisor.start(child)
    child._process.wait(20)
    with pytest.raises(SetupError) as raised:
        supervisor.fail_if_dead()
    assert raised.value.message.startswith(
        "worker exited with status 1 before the system was ready: no such model (log: "
    )


def test_groups_stop_one_after_the_other(make_child, signals, tmp_path):
    trace = tmp_path / "trace"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep({delay}); open({trace!r}, 'a').write({name!r} + ' '); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(600)"
    )
    parts = [
        make_child(name, code.format(delay=delay, trace=str(trace), name=name))
        for name, delay in (("gateway", 0.5), ("worker", 0.2), ("broker", 0))
    ]
    supervisor = supervise(signals)
    for part in parts:
        supervisor.start(part)
    for part in parts:
        wait_for_log(part)
    assert supervisor.stop([[part] for part in parts])
    assert trace.read_text().split() == ["gateway", "worker", "broker"]


def test_a_second_signal_kills_at_once(make_child, signals):
    child = make_child("worker", STUBBORN)
    supervisor = supervise(signals, drain_timeout_s=600)
    supervisor.start(child)
    wait_for_log(child)
    signals.hold()
    interrupt()
    supervisor.run()
    after(0.3, interrupt)
    assert not supervisor.stop([[child]])
    assert child.status == -signal.SIGKILL


def test_a_part_over_its_time_is_killed(make_child, signals, monkeypatch, capsys):
    monkeypatch.setattr("openlora.commands.supervisor.DRAIN_SLACK_S", 0.2)
    child = make_child("worker", STUBBORN)
    supervisor = supervise(signals, drain_timeout_s=0)
    supervisor.start(child)
    wait_for_log(child)
    assert not supervisor.stop([[child]])
    assert child.status == -signal.SIGKILL
    assert "worker did not stop in time and is killed" in capsys.readouterr().out


def test_killing_a_child_takes_what_it_had_spawned(make_child):
    code = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]).pid, 'up', flush=True)\n"
        "time.sleep(600)"
    )
    child = make_child("worker", code)
    child.start()
    wait_for_log(child)
    grandchild = psutil.Process(int(child.log_path.read_text().split()[0]))
    child.kill()
    psutil.wait_procs([grandchild], timeout=5)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_verbose_shows_each_line_with_its_process(make_child, signals, capsys):
    child = make_child("worker 1", SLEEPER)
    supervisor = supervise(signals, verbose=True)
    supervisor.start(child)
    wait_for_log(child)
    supervisor.pause(0)
    assert "[worker 1] up" in capsys.readouterr().out


def test_while_starting_a_stop_signal_interrupts_and_the_next_is_counted(signals):
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    interrupt()
    assert signals.stops == 2


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_status_in_words():
    assert how_it_ended(-9) == "was killed by SIGKILL"
    assert how_it_ended(3) == "exited with status 3"


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("", 1, ""),
        ("one\ntwo  \n\n", 1, "two"),
        ("two\n", -9, ""),
        ("openlora: no model\n", 1, "no model"),
        (
            "2026-01-02 03:04:05,678 ERROR workers.lifecycle event=engine_died\n",
            1,
            "event=engine_died",
        ),
        ("2026-01-02 03:04:05,678 CRITICAL gateway.system: lost\n", 1, "lost"),
        (
            "2026-01-02 03:04:05,678 ERROR a.b reason\n2026-01-02 03:04:05,679 INFO a.b stopped\n",
            1,
            "reason",
        ),
        ("2026-01-02 03:04:05,678 INFO a.b stopped\n", 1, ""),
        ("Traceback (most recent call last):\n  x\nKeyError: 'y'\n", 1, "KeyError: 'y'"),
    ],
)
def test_last_words_are_the_reason_and_no_news(tmp_path, text, status, words):
    log = tmp_path / "log"
    log.write_text(text)
    assert last_words(log, status) == words


def test_a_log_that_never_was_has_no_last_words(tmp_path):
    assert last_words(tmp_path / "log", 1) == ""
