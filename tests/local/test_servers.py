"""The embedded servers: they answer, they say why they do not, they die with their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from openlora.errors import SetupError
from openlora.local import ServerProcess, ServerSpec, embedded_broker, embedded_redis, free_port

pytestmark = pytest.mark.services


def test_redis_keeps_what_it_acknowledged_over_a_kill(tmp_path: Path) -> None:
    with embedded_redis(tmp_path) as server:
        with redis.Redis.from_url(server.address) as client:
            client.set("a", "1")
        server.kill()
        assert server.poll() == -signal.SIGKILL
        server.start()
        with redis.Redis.from_url(server.address) as client:
            assert client.get("a") == b"1"


def test_redis_wants_the_password_and_does_not_show_it(tmp_path: Path) -> None:
    password = 'with "quotes" and \\ and spaces'
    server = embedded_redis(tmp_path, password=password)
    with server:
        once = Retry(NoBackoff(), 0)
        stranger = redis.Redis(port=server.spec.port, retry=once)
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
        stranger.close()
        with redis.Redis(port=server.spec.port, password=password) as client:
            assert client.ping()
        assert password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert password not in repr(server.spec.argv)


@pytest.mark.parametrize("make", [embedded_broker, embedded_redis])
def test_a_taken_port_is_one_clear_line(tmp_path: Path, make) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(SetupError, match=rf"port {taken} .*choose another port"):
            make(tmp_path, port=taken).start()


@pytest.mark.parametrize("make", [embedded_broker, embedded_redis])
def test_stop_frees_the_port_and_start_takes_it_again(tmp_path: Path, make) -> None:
    server = make(tmp_path)
    server.start()
    address, first_pid = server.address, server.pid
    server.stop()
    server.stop()
    assert not server.spec.is_ready()
    server.start()
    assert (server.address, server.spec.is_ready()) == (address, True)
    assert server.pid != first_pid
    server.stop()


def _spec(script: str, is_ready=lambda: False) -> ServerSpec:
    port = free_port()
    argv = (sys.executable, "-c", textwrap.dedent(script))
    return ServerSpec("test server", argv, port, f"127.0.0.1:{port}", is_ready)


def test_a_server_that_exits_is_reported_with_its_output(tmp_path: Path) -> None:
    server = ServerProcess(_spec("print('no room left'); raise SystemExit(3)"), tmp_path / "log")
    with pytest.raises(SetupError, match="exited with status 3: no room left"):
        server.start()


def test_a_server_that_does_not_answer_is_stopped(tmp_path: Path) -> None:
    server = ServerProcess(_spec("import time; time.sleep(60)"), tmp_path / "log")
    with pytest.raises(SetupError, match=r"did not answer within 0\.3 s: it printed nothing"):
        server.start(timeout_s=0.3)
    assert server.poll() is not None


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    spec = ServerSpec("test server", ("/nowhere/server",), free_port(), "", lambda: True)
    with pytest.raises(SetupError, match="cannot be started from /nowhere/server: No such file"):
        ServerProcess(spec, tmp_path / "log").start()


def test_a_server_deaf_to_sigterm_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"""
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(60)
    """
    server = ServerProcess(_spec(script, ready.exists), tmp_path / "log")
    server.start()
    server.stop(grace_s=0.2)
    assert server.poll() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_servers_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = """
        import pathlib, sys, time
        from openlora.local import embedded_broker, embedded_redis
        data_dir = pathlib.Path(sys.argv[1])
        servers = [embedded_broker(data_dir), embedded_redis(data_dir)]
        for server in servers:
            server.start()
        print(*(server.pid for server in servers), flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    with parent.stdout as output:
        pids = [int(pid) for pid in output.readline().split()]
    assert len(pids) == 2
    assert all(_is_alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} outlived their parent"
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    """Running, not merely a zombie that whoever adopted it has not collected yet."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
