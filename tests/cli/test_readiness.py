"""``/readyz`` as ``openlora up`` reads it, and what it shows meanwhile."""

from __future__ import annotations

import http.server
import io
import json
import threading

import pytest
from rich.console import Console

from openlora.commands.readiness import Readiness, load_view, read_readiness
from openlora.commands.screen import Screen
from openlora.errors import SetupError
from openlora.local import free_port


@pytest.fixture
def answer():
    """Serve ``(status, body)`` on every path; → the URL."""
    servers = []

    def serve(status, body):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                return

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_nobody_listens():
    assert read_readiness(f"http://127.0.0.1:{free_port()}") == Readiness()


def test_workers_that_load(answer):
    starting = [{"id": "w", "pid": 12, "loaded": 0.4}]
    url = answer(503, json.dumps({"waiting_for": ["worker"], "starting": starting}).encode())
    readiness = read_readiness(url)
    assert not readiness.is_ready
    assert readiness == Readiness(True, ("worker",), {12: 0.4})


def test_ready(answer):
    assert read_readiness(answer(200, b'{"waiting_for":[]}')).is_ready


def test_another_program_on_the_port(answer):
    with pytest.raises(SetupError, match="another program uses the port"):
        read_readiness(answer(404, b"<html>"))


@pytest.fixture
def screen():
    return lambda *, live: _screen(live)


def _screen(live):
    screen = Screen()
    screen.console = Console(file=io.StringIO(), force_terminal=live, width=120)
    screen.live = live
    return screen


def test_lines_where_there_is_no_terminal(screen):
    plain = screen(live=False)
    with load_view(plain, ["worker 1", "worker 2"]) as view:
        view.show({}, ["the gateway"])
        view.show({"worker 1": 0.0}, ["worker"])
        for share in (0.3, 0.31, 0.49, 1.0):
            view.show({"worker 1": share, "worker 2": share / 2}, ["worker"])
    assert plain.console.file.getvalue().splitlines() == [
        "Waiting for the gateway",
        "Loading the model: worker 1 0%",
        "Waiting for worker",
        "Loading the model: worker 1 25%",
        "Loading the model: worker 2 0%",
        "Loading the model: worker 1 100%",
        "Loading the model: worker 2 50%",
    ]


def test_a_bar_for_each_worker_on_a_terminal(screen):
    live = screen(live=True)
    with load_view(live, ["worker 1", "worker 2"]) as view:
        view.show({"worker 1": 0.42}, ["worker"])
        view._progress.refresh()
        shown = live.console.file.getvalue()
        assert "worker 1 loads" in shown
        assert "42%" in shown
        assert "worker 2 starts" in shown
        view.show({"worker 1": 1.0}, ["worker"])
        view._progress.refresh()
    assert "worker 1 joins the others" in live.console.file.getvalue()
