"""Dispatch, help, exit statuses, and a start that imports next to nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from openlora import __version__, cli
from openlora.errors import SetupError, UnknownAdapter

ROOT = Path(__file__).parents[2]


def openlora(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openlora", *words],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_names_every_command():
    shown = openlora("--help")
    assert shown.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n    {name} " in shown.stdout


def test_version():
    assert openlora("--version").stdout == f"openlora {__version__}\n"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_each_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert f"openlora {command}" in shown


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from openlora.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'rich', 'httpx', 'kafka', 'redis', 'msgspec', 'asyncio', 'starlette'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "flag"), [("gateway", "--kafka"), ("worker", "--model"), ("up", "--adapters")]
)
def test_process_commands_show_their_own_flags(command, flag, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert flag in capsys.readouterr().out


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fly"])
    assert ended.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [SetupError("no port"), UnknownAdapter("no port")])
def test_an_error_is_one_line_and_status_1(error, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr("openlora.commands.workers.run", fail)
    assert cli.main(["workers"]) == 1
    assert capsys.readouterr().err == "openlora: no port\n"


def test_a_missing_package_is_named_with_where_to_look(monkeypatch, capsys):
    def fail(args):
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr("openlora.commands.workers.run", fail)
    assert cli.main(["workers"]) == 1
    assert capsys.readouterr().err == (
        "openlora: the package 'rich' is not installed; `openlora doctor` says which extra brings "
        "it\n"
    )


def test_an_error_in_our_own_imports_is_not_hidden(monkeypatch):
    def fail(args):
        raise ModuleNotFoundError("No module named 'openlora.nope'", name="openlora.nope")

    monkeypatch.setattr("openlora.commands.workers.run", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["workers"])


def test_ctrl_c_gives_130(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("openlora.commands.workers.run", interrupted)
    assert cli.main(["workers"]) == 130


def test_a_closed_pipe_is_no_traceback():
    """`openlora … | head -0`: the reader is gone before a line is written."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m openlora doctor | true; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr


def test_nothing_answers_is_one_line():
    done = openlora("workers", "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("openlora: no OpenLoRA answers at http://127.0.0.1:1")
    assert done.stderr.count("\n") == 1


def test_doctor_finds_all_that_this_environment_has():
    done = openlora("doctor")
    assert done.returncode == 0, done.stdout
    assert "`openlora up` has all it needs." in done.stdout
    assert "embedded Kafka" in done.stdout


def test_bench_shows_the_benchmark_s_own_help():
    done = openlora("bench", "decode", "--help")
    assert done.returncode == 0
    assert "--distinct" in done.stdout
