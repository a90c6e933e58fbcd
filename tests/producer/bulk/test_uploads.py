"""Inputs that arrive in part, and disks without room: nothing half-made is left, and it is said."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.producer.bulk.running import BulkSystem, running_bulk
from tests.workers.running import wait_until

pytestmark = pytest.mark.services

BOUNDARY = "cut-here"
HEAD = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
).encode()
LINE = b'{"prompt": "hello"}\n'


def uploads_of(bulk: BulkSystem) -> set[str]:
    """IDs of what was sent, without results: those of other tests' batches may still come."""
    with httpx.Client(base_url=bulk.gateway.url) as client:
        files = client.get("/v1/files").json()["data"]
    return {file["id"] for file in files if file["purpose"] == "batch"}


def peers(process: psutil.Process) -> set[int]:
    """Ports of those who are connected to it."""
    return {found.raddr.port for found in process.net_connections() if found.raddr}


def kept(bulk: BulkSystem) -> set[str]:
    return {path.name for path in (bulk.directory / "batches" / "files").glob("*")}


def test_an_upload_whose_connection_is_cut_leaves_nothing(bulk: BulkSystem) -> None:
    bulk.submit(LINE)
    before, kept_before = uploads_of(bulk), kept(bulk)
    gateway = psutil.Process(bulk.gateway.process.pid)
    url = urlsplit(bulk.gateway.url)
    body = HEAD + LINE * 100_000
    with socket.create_connection((url.hostname, url.port)) as client:
        client.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
            f"Content-Length: {2 * len(body)}\r\n\r\n".encode()
        )
        client.sendall(body)
        port = client.getsockname()[1]
        wait_until(lambda: port in peers(gateway))
    wait_until(lambda: port not in peers(gateway))
    assert uploads_of(bulk) == before
    assert kept(bulk) == kept_before


def test_a_form_that_ends_in_the_middle_of_its_file_is_refused(bulk: BulkSystem) -> None:
    before, kept_before = uploads_of(bulk), kept(bulk)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = httpx.post(f"{bulk.gateway.url}/v1/files", content=HEAD + LINE * 100, headers=headers)
    assert answer.status_code == 400, answer.text
    assert "file" in answer.json()["error"]["message"]
    assert uploads_of(bulk) == before
    assert kept(bulk) == kept_before


def test_results_that_find_no_room_are_said_with_their_line(
    bulk: BulkSystem, tmp_path: Path
) -> None:
    batch_id = bulk.submit(b'{"prompt": "hello", "max_tokens": 2}\n' * 500)
    bulk.wait_over(batch_id)
    target = tmp_path / "out.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "openlora", "batch", "results", batch_id, "-o", str(target)],
        env={**os.environ, "OPENLORA_URL": bulk.gateway.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        # a file may not grow beyond this: the write fails as on a full disk
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 1
    assert "cannot be written beyond line" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert bulk.command("batch", "results", batch_id, "-o", str(target)).returncode == 0
    assert len(target.read_text().splitlines()) == 500


def test_results_that_are_not_there_leave_no_file(bulk: BulkSystem, tmp_path: Path) -> None:
    batch_id = bulk.submit(b'{"prompt": "hello", "max_tokens": 100000}\n')
    target = tmp_path / "out.jsonl"
    done = bulk.command("batch", "results", batch_id, "-o", str(target))
    assert done.returncode == 1
    assert "once it is over" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert bulk.command("batch", "cancel", batch_id).returncode == 0


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[None]:
    directory.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("only root may make a disk that is too small")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.long
def test_a_store_without_room_is_waited_out(tmp_path: Path) -> None:
    store = tmp_path / "batches"
    with small_disk(store, "2m"), running_bulk(tmp_path) as bulk:
        bulk.start_worker()
        bulk.start_producer()
        data = b"".join(
            b'{"prompt": "%d %s", "max_tokens": 2}\n' % (n, b"x" * 900) for n in range(1500)
        )
        answer = httpx.post(
            f"{bulk.gateway.url}/v1/files",
            data={"purpose": "batch"},
            files={"file": ("in.jsonl", data * 3)},
        )
        assert answer.status_code == 503, answer.text
        assert "No space left" in answer.json()["error"]["message"]
        assert kept(bulk) == set()
        batch_id = bulk.submit(data)  # half of the disk; the lines by adapter take as much again
        wait_until(lambda: "No space left" in bulk.state(batch_id).problem, 60)
        subprocess.run(["mount", "-o", "remount,size=64m", str(store)], check=True)
        state = bulk.wait_over(batch_id, 60)
        assert (state.status, state.total, state.failed) == ("completed", 1500, 0)
        lines = [json.loads(line)["line"] for line in bulk.results(batch_id)]
        assert lines == list(range(1, 1501))
