"""The engine process, started for real, behind its client."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time

import pytest

from openlora.errors import SetupError
from openlora.sampling_params import SamplingParams
from tests.integration.up_system import write_model
from tests.workers.running import is_alive, wait_until
from workers.engine_client import EngineClient, EngineGone
from workers.messages import EngineSetup, Start

pytestmark = pytest.mark.services


def setup(kind="scripted:200", model="none"):
    return EngineSetup(kind=kind, model=model, device="cpu", dtype="auto", log_level="WARNING")


@pytest.fixture
def engine():
    client = EngineClient(setup())
    client.wait_ready()
    yield client
    client.stop()


def start(ticket, max_tokens=5):
    return Start(ticket, (1, 2, 3), SamplingParams(max_tokens=max_tokens))


def outputs_until(engine, is_enough, timeout_s=30):
    outputs, loads = [], []
    deadline = time.monotonic() + timeout_s
    while not is_enough(outputs):
        assert time.monotonic() < deadline
        engine.flush()
        select.select([engine.sock], [], [], 0.1)
        for step in engine.receive():
            outputs += step.outputs
            if step.load is not None:
                loads.append(step.load)
    return outputs, loads


def test_commands_go_out_together_and_steps_come_back(engine):
    engine.start(start(10))
    engine.start(start(11, max_tokens=3))
    outputs, loads = outputs_until(
        engine, lambda seen: sum(o.finish_reason is not None for o in seen) == 2
    )
    assert [o.index for o in outputs if o.ticket == 10] == [0, 1, 2, 3, 4]
    assert [o.finish_reason for o in outputs if o.ticket == 11] == [None, None, "length"]
    assert all(load.running in (0, 2) for load in loads)


def test_an_aborted_run_goes_silent_and_others_go_on(engine):
    engine.start(start(1, max_tokens=100_000))
    engine.start(start(2, max_tokens=100_000))
    outputs_until(engine, lambda seen: len(seen) >= 4)
    engine.abort(1)
    # what was said before it heard of it comes first; a step has a token of each run
    outputs_until(engine, lambda seen: [o.ticket for o in seen[-2:]] == [2, 2])
    late, _ = outputs_until(engine, lambda seen: len(seen) >= 10)
    assert {output.ticket for output in late} == {2}


def test_the_engine_waits_when_nobody_reads_and_loses_nothing():
    client = EngineClient(setup("scripted"))
    client.wait_ready()
    for ticket in range(50):
        client.start(start(ticket, max_tokens=2000))
    client.flush()
    time.sleep(0.5)
    outputs, _ = outputs_until(client, lambda seen: len(seen) == 100_000, timeout_s=90)
    for ticket in range(50):
        assert [o.index for o in outputs if o.ticket == ticket] == list(range(2000))
    client.stop()


def test_a_killed_engine_is_noticed_at_the_next_read_or_write(engine):
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineGone) as gone:
        outputs_until(engine, lambda seen: False)
    assert gone.value.status == -signal.SIGKILL


FAILS_WHILE_A_THREAD_WORKS = """
import sys, threading, time
from workers import engine_process

class Broken(engine_process.ScriptedEngine):
    def step(self):
        threading.Thread(target=time.sleep, args=(60,)).start()  # as one that loads an adapter
        raise RuntimeError("broken")

engine_process.build_engine = lambda setup, progress: Broken()
engine_process.run()
"""
CLOSES_AND_STAYS = """
import socket, sys, time
from workers import engine_process

engine_process.EngineServer.serve = lambda self: self._sock.shutdown(socket.SHUT_RDWR)
engine_process.os._exit = lambda status: time.sleep(60)
engine_process.run()
"""


@pytest.mark.parametrize("program", [FAILS_WHILE_A_THREAD_WORKS, CLOSES_AND_STAYS])
def test_an_engine_that_is_broken_is_gone_at_once_whatever_holds_it_up(monkeypatch, program):
    popen = subprocess.Popen

    def start_program(argv, **settings):
        return popen([argv[0], "-c", program, argv[-1]], **settings)

    monkeypatch.setattr("workers.engine_client.subprocess.Popen", start_program)
    engine = EngineClient(setup())
    engine.wait_ready()
    engine.start(start(1))
    began = time.monotonic()
    with pytest.raises(EngineGone) as gone:
        outputs_until(engine, lambda seen: False)
    assert time.monotonic() - began < 30  # of the minute that it would take
    assert gone.value.status == 1
    assert not is_alive(engine.pid)


def test_stop_ends_the_process(engine):
    engine.start(start(1, max_tokens=100_000))
    engine.flush()
    pid = engine.pid
    engine.stop()
    wait_until(lambda: not is_alive(pid))


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path):
    client = EngineClient(setup("model", str(tmp_path / "missing")))
    with pytest.raises(SetupError, match="missing"):
        client.wait_ready()
    client.stop()


def test_the_load_of_a_real_model_is_told_to_its_end(tmp_path):
    client = EngineClient(setup(kind="model", model=str(write_model(tmp_path / "model"))))
    shares = []
    try:
        facts = client.wait_ready(shares.append)
    finally:
        client.stop()
    assert facts.hidden_size == 64
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_model_that_does_not_exist_is_one_clear_error(tmp_path):
    client = EngineClient(setup(kind="model", model=str(tmp_path / "none")))
    try:
        with pytest.raises(SetupError, match="no such directory"):
            client.wait_ready()
    finally:
        client.stop()
