"""Servers with S3's and Google Cloud Storage's protocols, for s3:// and gs:// URLs."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest

from openlora.local import free_port


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Its URL."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    """Its URL."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The s3:// URL of an empty bucket, which this process and those that it starts can reach."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield from _bucket("s3")


@pytest.fixture
def gs_bucket(gs_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As ``s3_bucket``, of a gs:// URL."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gs_server)
    yield from _bucket("gs")


def _bucket(scheme: str) -> Iterator[str]:
    kind = fsspec.get_filesystem_class(scheme)
    # It remembers the server and the keys of whoever made it.
    kind.clear_instance_cache()
    system = fsspec.filesystem(scheme)
    system.mkdir("adapters")
    yield f"{scheme}://adapters"
    system.rm("adapters", recursive=True)
    kind.clear_instance_cache()
