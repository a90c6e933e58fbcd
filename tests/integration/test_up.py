"""``openlora up`` as a user meets it: start, stream, look around, lose a worker, stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import psutil
import pytest

from openlora.local import free_port
from tests.integration.up_system import UpSystem, write_adapters, write_model

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Flags for the tiny model and its adapters."""
    root = tmp_path_factory.mktemp("up")
    model = write_model(root / "model")
    return ("--model", str(model), "--adapters", str(write_adapters(model, root / "adapters")))


@pytest.fixture(scope="module")
def system(files, tmp_path_factory):
    running = UpSystem(tmp_path_factory.mktemp("system"), free_port(), *files)
    running.wait_ready()
    yield running
    if running.process.poll() is None:
        assert running.stop() == 0, running.output


def text_of(frames):
    assert frames[0]["type"] == "accepted"
    assert frames[-1]["type"] == "done", frames[-1]
    tokens = [frame for frame in frames if frame["type"] == "token"]
    assert [frame["index"] for frame in tokens] == list(range(len(tokens)))
    return "".join(frame["text"] for frame in tokens) + frames[-1]["text"]


def test_base_adapter_and_ensemble_stream_at_once(system):
    mix = [{"id": "pirate", "weight": 0.6}, {"id": "poet", "weight": 0.4}]
    ask = {"prompt": "the sea", "params": GREEDY}
    frames = system.stream(
        {"base": ask, "one": {**ask, "adapter": "pirate"}, "mix": {**ask, "adapters": mix}}
    )
    texts = {name: text_of(of_one) for name, of_one in frames.items()}
    assert len(set(texts.values())) == 3
    assert [ref["id"] for ref in frames["mix"][0]["adapters"]] == ["pirate", "poet"]
    assert frames["base"][-1]["usage"]["completion_tokens"] == GREEDY["max_tokens"]


def test_the_lines_of_a_batch_are_answered_as_requests_are(system):
    """Each by its adapters, in every form of a line; beside them a line that cannot be run."""
    mix = [{"id": "pirate", "weight": 0.6}, {"id": "poet", "weight": 0.4}]
    which = {"base": {}, "one": {"adapter": "pirate"}, "mix": {"adapters": mix}}
    frames = system.stream(
        {name: {"prompt": "the sea", "params": GREEDY, **use} for name, use in which.items()}
    )
    lines = [{"prompt": "the sea", "custom_id": n, **use, **GREEDY} for n, use in which.items()]
    body = {"model": "pirate", "prompt": "the sea", **GREEDY}
    lines.append({"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": body})
    lines.append({"prompt": "the sea", "custom_id": "none", "adapter": "nobody"})
    stdin = "".join(json.dumps(line) + "\n" for line in lines)
    done = system.command("batch", "submit", "-", "--wait", stdin=stdin)
    assert done.returncode == 0, done.stderr
    found = system.command("batch", "results", done.stdout.split()[-1])
    results = {row["custom_id"]: row for row in map(json.loads, found.stdout.splitlines())}
    assert list(results) == ["base", "one", "mix", "text", "none"]
    assert results.pop("none")["error"]["code"] == "unknown_adapter"
    choices = results.pop("text")["response"]["body"]["choices"]
    texts = {name: row["text"] for name, row in results.items()}
    assert texts == {name: text_of(of_one) for name, of_one in frames.items()}
    assert choices[0]["text"] == texts["one"]


def test_the_start_names_url_adapters_and_the_bad_one(system):
    assert f"Ready: {system.url}" in system.output
    assert "pirate" in system.output
    assert "Adapter broken is left out: " in system.output
    assert f"chat --adapter pirate --url {system.url}" in system.output
    assert "Traceback" not in system.output


def test_workers_and_topics_tell_who_owns_what(system):
    workers = json.loads(system.command("workers", "--json").stdout)
    assert len(workers) == 1
    assert workers[0]["ready"]
    rows = json.loads(system.command("topics", "--json").stdout)
    assert {row["topic"] for row in rows} == {"openlora.jobs", "openlora.batch"}
    assert all(row["owners"] == [workers[0]["id"]] for row in rows)
    assert "64 partitions, 64 owned by 1 worker(s)" in system.command("topics").stdout


def test_the_load_of_the_model_was_shown(system):
    assert "Loading the model: worker 1 100%" in system.output


def test_chat_through_a_pipe_prints_the_answer_alone(system):
    flags = ("--temperature", "0", "--max-tokens", "8")
    answers = {
        which: system.command("chat", *which, *flags, stdin="the sea")
        for which in ((), ("--adapter", "pirate"), ("--mix", "pirate=0.6", "poet=0.4"))
    }
    for answer in answers.values():
        assert answer.returncode == 0, answer.stderr
        assert answer.stderr == ""
    assert len({answer.stdout for answer in answers.values()}) == 3
    again = system.command("chat", *flags, stdin="the sea")
    assert again.stdout == answers[()].stdout


def test_adapters_are_added_shown_and_removed_while_serving(system, files):
    source = f"{files[3]}/poet"
    assert system.command("adapters", "add", "bard", source).stdout.startswith("bard version 1")
    assert json.loads(system.command("adapters", "show", "bard").stdout)["rank"] == 8
    assert "bard" in system.command("adapters", "list").stdout
    poet = system.command("chat", "--adapter", "poet", "--temperature", "0", stdin="the sea")
    bard = system.command("chat", "--adapter", "bard", "--temperature", "0", stdin="the sea")
    assert bard.stdout == poet.stdout
    assert system.command("adapters", "remove", "bard").returncode == 0
    gone = system.command("chat", "--adapter", "bard", stdin="the sea")
    assert gone.returncode == 1
    assert gone.stdout == ""
    assert gone.stderr.startswith("openlora: adapter 'bard' is not registered")
    assert gone.stderr.count("\n") == 1


def test_a_second_up_on_the_port_is_one_clear_line(system, files, tmp_path):
    port = int(system.url.rsplit(":", 1)[1])
    other = UpSystem(tmp_path, port, *files)
    assert other.process.wait(30) == 1
    assert other.output.startswith(f"openlora: port {port} of 127.0.0.1 cannot be used")
    assert other.output.count("\n") == 1


def test_a_killed_worker_is_started_again(system):
    worker = next(c for c in system.children() if c.cmdline()[-1] == "worker")
    worker.send_signal(signal.SIGKILL)
    system.wait_until_it_says("worker 1 was killed by SIGKILL")
    system.wait_until_it_says("worker 1 was started again")
    frames = system.stream({"r": {"prompt": "the sea", "params": GREEDY, "adapter": "poet"}})
    assert text_of(frames["r"])


def test_sigint_drains_and_leaves_nothing(system):
    assert system.stop(signal.SIGINT) == 0, system.output
    assert system.output.endswith("Stopped.\n")


@pytest.mark.long
def test_adapters_outlive_a_restart_and_children_die_with_a_killed_supervisor(files, tmp_path):
    port = free_port()
    first = UpSystem(tmp_path, port, *files)
    first.wait_ready()
    added = first.command("adapters", "add", "bard", f"{files[3]}/poet")
    assert added.returncode == 0, added.stderr
    assert first.stop(signal.SIGTERM) == 0

    second = UpSystem(tmp_path, port, *files)
    second.wait_ready()
    assert "bard" in second.command("adapters", "list").stdout
    started = second.children()
    assert len(started) >= 5
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait(10)
    _, left = psutil.wait_procs(started, timeout=10)
    assert not left


@pytest.mark.long
def test_a_second_signal_stops_at_once(files, tmp_path):
    running = UpSystem(tmp_path, free_port(), *files)
    running.wait_ready()
    started = running.children()
    for child in running.process.children():
        child.suspend()  # a drain that would never end
    begun = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    running.wait_until_it_says("Stopping:")
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(20) == 130
    assert time.monotonic() - begun < 20
    _, left = psutil.wait_procs(started, timeout=5)
    assert not left


@pytest.mark.long
def test_an_interrupt_while_starting_leaves_nothing(files, tmp_path):
    running = UpSystem(tmp_path, free_port(), *files)
    running.wait_until_it_says("Loading the model")
    assert running.stop(signal.SIGINT) == 0
    assert "Traceback" not in running.output


@pytest.mark.long
@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--kafka", "{}", "no Kafka broker answers at {}"),
        ("--redis", "redis://{}/0", "Redis at {} does not answer"),
    ],
)
def test_an_unreachable_server_is_one_clear_line(files, tmp_path, flag, value, line):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        running = UpSystem(tmp_path, free_port(), *files, flag, value.format(address))
        assert running.process.wait(60) == 1
    assert line.format(address) in running.output
    assert "Traceback" not in running.output


def test_the_demo_model_answers_with_its_adapters(demo_model, tmp_path, monkeypatch):
    (cache,) = (path.parent for path in demo_model.parents if path.name == "openlora")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # as a user starts it: all cores
    running = UpSystem(tmp_path, free_port())
    running.wait_until_it_says("Ctrl-C stops.", timeout_s=300)
    ask = {
        "messages": [{"role": "user", "content": "Tell me about the sea."}],
        "params": {"temperature": 0, "max_tokens": 16},
    }
    mix = [{"id": "pirate", "weight": 0.5}, {"id": "haiku", "weight": 0.5}]
    frames = running.stream(
        {"base": ask, "one": {**ask, "adapter": "pirate"}, "mix": {**ask, "adapters": mix}}
    )
    assert len({text_of(of_one) for of_one in frames.values()}) == 3
    assert running.stop() == 0, running.output
