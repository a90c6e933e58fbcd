"""The set-up script: what it says, when it works again, and what pip's lines become."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup_venv

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder whose .venv is made by nobody: pip and venv are recorded, not run."""
    for name in ("pyproject.toml", "constraints.txt", "tools/setup_venv.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".venv").mkdir()
    calls = []
    monkeypatch.setattr(setup_venv, "ROOT", tmp_path)
    monkeypatch.setattr(setup_venv, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup_venv, "make_venv", lambda: calls.append("venv"))
    monkeypatch.setattr(setup_venv, "pip", lambda *words, **_: calls.append(words))
    return tmp_path, calls


def test_the_second_time_nothing_is_done(project):
    _, calls = project
    setup_venv.install("run")
    assert calls[0] == "venv"
    assert ".[serve,local,demo]" in calls[1]
    assert setup_venv.DEMO_MODEL in calls[2]
    calls.clear()
    setup_venv.install("run")
    assert calls == []


def test_what_tests_need_is_enough_to_run(project):
    _, calls = project
    setup_venv.install("test")
    calls.clear()
    setup_venv.install("run")
    assert calls == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again(project, name):
    folder, calls = project
    setup_venv.install("run")
    calls.clear()
    (folder / name).write_text("changed")
    setup_venv.install("run")
    assert calls


def test_a_failed_install_leaves_no_stamp(project, monkeypatch):
    folder, _ = project

    def fail(*words, **options):
        setup_venv.fail("no network")

    monkeypatch.setattr(setup_venv, "pip", fail)
    with pytest.raises(SystemExit):
        setup_venv.install("run")
    assert not list((folder / ".venv").glob(".installed-*"))


def test_an_old_python_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(setup_venv, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(SystemExit):
        setup_venv.main()
    said = capsys.readouterr().err
    assert said.startswith("openlora setup: Python 3.11 or later is needed")
    assert said.count("\n") == 1


def test_pip_s_lines_become_one_line_per_step_off_a_terminal(capsys):
    progress = setup_venv.Progress("Installing")
    for line in ("Collecting torch==2.13.0 (from x)", "Progress 10 of 100", "noise"):
        progress.feed(line)
    progress.end()
    assert capsys.readouterr().out.splitlines() == ["Installing …", "Installing: done in 0 s"]


def test_progress_is_drawn_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = setup_venv.Progress("Installing")
    progress.feed("Collecting torch==2.13.0")
    progress.feed("Downloading torch-2.13.0-cp311.whl (190 MB)")
    progress.feed("Progress 95000000 of 190000000")
    shown = capsys.readouterr().out
    assert "1 packages, torch" in shown
    assert "torch ██████████░░░░░░░░░░ 95/190 MB" in shown


def test_make_picks_a_new_python_and_hands_arguments_on():
    shown = subprocess.run(
        ["make", "-n", "up", "ARGS=--port 9000"],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "exec .venv/bin/openlora up --port 9000" in shown
    assert "tools/setup_venv.py run" in shown
