"""Adapters from and in S3 and Google Cloud Storage, over their real protocols."""

from __future__ import annotations

import fsspec
import pytest

from openlora.adapters.disk_cache import DiskCache
from openlora.adapters.peft_format import inspect_adapter
from openlora.adapters.remote_store import RemoteStore
from openlora.adapters.sources import fetch
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import write_adapter
from tests.adapters.test_sources import files_of, zipped

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def into(tmp_path):
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    return request.getfixturevalue(f"{request.param}_bucket")


@pytest.fixture
def system(bucket):
    return fsspec.filesystem(bucket.partition("://")[0])


def test_a_directory_and_an_archive_in_a_bucket(bucket, system, into, tmp_path):
    source = write_adapter(tmp_path / "poet")
    for path in source.iterdir():
        system.put_file(str(path), f"adapters/poet/{path.name}")
    fetch(f"{bucket}/poet", into)
    assert inspect_adapter(into).hash == inspect_adapter(source).hash
    zipped(tmp_path / "poet.zip", files_of(source, "poet-main/"))
    system.put_file(str(tmp_path / "poet.zip"), "adapters/poet.zip")
    (tmp_path / "other").mkdir()
    fetch(f"{bucket}/poet.zip", tmp_path / "other")
    assert inspect_adapter(tmp_path / "other").hash == inspect_adapter(source).hash


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adapters/nobody", "adapter_config.json is missing there"),
        ("no-such-bucket/poet", "adapter_config.json is missing there"),
        ("adapters/nobody.zip", "FileNotFoundError"),
    ],
)
def test_what_is_not_there_is_named(bucket, into, name, says):
    url = bucket.replace("adapters", name)
    with pytest.raises(AdapterFailed, match=says) as caught:
        fetch(url, into)
    assert url in caught.value.message
    assert list(into.iterdir()) == []


def test_a_server_that_is_away_is_named(s3_bucket, into, monkeypatch):
    # S3's alone: gcsfs asks again for half a minute, whatever it is told.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(AdapterFailed, match=r"s3://adapters/poet cannot be read: .*127\.0\.0\.1:9"):
        fetch(f"{s3_bucket}/poet", into, timeout_s=60)


def test_other_bytes_in_the_bucket_are_found_out(bucket, system, tmp_path):
    store = RemoteStore(f"{bucket}/store", tmp_path / "cache")
    content = store.put(write_adapter(tmp_path / "a"), holder="here").hash
    key = f"adapters/store/{content}/{WEIGHTS}"
    data = system.cat_file(key)
    system.pipe_file(key, data[:-1] + bytes([data[-1] ^ 1]))
    cache = DiskCache(store.scratch, store, 1 << 30, back_off_s=(0.001,))
    with pytest.raises(AdapterFailed, match=rf"{bucket}/store gives other bytes .*SHA-256"):
        cache.ensure(store.path(content))
