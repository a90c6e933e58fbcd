"""Adapters of a hub, by its own library over its own protocol, from a server of this machine."""

from __future__ import annotations

import http.server
import json
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from openlora.adapters.peft_format import inspect_adapter
from openlora.adapters.sources import fetch
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import write_adapter
from tests.adapters.serving import serving

SHA = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, acme/poet, with the files of ``root``; acme/gated is not for everybody."""

    def __init__(self, root: Path, *args) -> None:
        self.root = root
        super().__init__(*args)

    def do_GET(self):
        path = urlsplit(self.path).path
        files = {file.name: file for file in self.root.iterdir()}
        name = path.rpartition("/")[2]
        if "acme/gated" in path:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif "acme/poet" not in path:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/paths-info/" in path:
            self._json([])  # of a folder that is not there
        elif "/tree/" in path:
            self._json(
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": "b" * 40}
                for n, f in files.items()
            )
        elif "/resolve/" in path and name in files:
            self._answer(200, files[name].read_bytes(), {"ETag": '"x"', "X-Repo-Commit": SHA})
        elif "/resolve/" in path:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer(200, json.dumps({"id": "acme/poet", "sha": SHA, "siblings": []}).encode())

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def _json(self, entries):
        self._answer(200, json.dumps(list(entries)).encode())

    def _answer(self, status, data, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The files of acme/poet."""
    root = write_adapter(tmp_path / "poet")
    with serving(partial(Hub, root)) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        yield root


@pytest.fixture
def into(tmp_path):
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


@pytest.mark.parametrize("url", ["hf://acme/poet", "hf://acme/poet@main"])
def test_a_repository_with_and_without_its_revision(repository, into, url):
    fetch(url, into)
    assert inspect_adapter(into).hash == inspect_adapter(repository).hash


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("hf://acme/nobody", r"hf://acme/nobody cannot be read: .*missing there \(.*404"),
        ("hf://acme/gated", r"hf://acme/gated cannot be read: .*missing there \(.*(403|gated)"),
        ("hf://acme/poet/folder", "adapter_config.json is missing there"),
    ],
)
def test_what_cannot_be_had_is_named(repository, into, url, says):
    with pytest.raises(AdapterFailed, match=says):
        fetch(url, into)
    assert list(into.iterdir()) == []
