"""The content-addressed store: complete or absent, whatever happens meanwhile."""

from __future__ import annotations

import threading

import pytest

from openlora.adapters.peft_format import inspect_adapter
from openlora.adapters.store import AdapterStore
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import edit_config, write_adapter


def test_put_copies_what_counts_and_nothing_else(tmp_path):
    source = write_adapter(tmp_path / "a")
    (source / "README.md").write_text("hello")
    store = AdapterStore(tmp_path / "store")
    info = store.put(source)
    path = store.path(info.hash)
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert inspect_adapter(path) == info
    assert [p.name for p in (tmp_path / "store").iterdir()] == [info.hash]


def test_the_same_content_twice_is_one(tmp_path):
    store = AdapterStore(tmp_path / "store")
    first = store.put(write_adapter(tmp_path / "a"))
    assert store.put(write_adapter(tmp_path / "b")) == first
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_links_within_the_directory_become_files(tmp_path):
    source = write_adapter(tmp_path / "a")
    (source / "adapter_model.safetensors").rename(source / "blob")
    (source / "adapter_model.safetensors").symlink_to("blob")
    store = AdapterStore(tmp_path / "store")
    info = store.put(source)
    assert not (store.path(info.hash) / "adapter_model.safetensors").is_symlink()


def test_an_unusable_adapter_leaves_nothing(tmp_path):
    source = write_adapter(tmp_path / "a")
    edit_config(source, use_dora=True)
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(AdapterFailed, match="DoRA"):
        store.put(source)
    assert list((tmp_path).glob("store/*")) == []


def test_many_at_once(tmp_path):
    source = write_adapter(tmp_path / "a")
    store = AdapterStore(tmp_path / "store")
    results = []
    threads = [threading.Thread(target=lambda: results.append(store.put(source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert [p.name for p in (tmp_path / "store").iterdir()] == [results[0].hash]


@pytest.mark.parametrize("name", ["..", "../../etc", "a" * 63, "A" * 64, ""])
def test_what_is_no_hash(tmp_path, name):
    with pytest.raises(AdapterFailed, match="no content hash"):
        AdapterStore(tmp_path).path(name)


def test_a_hash_it_does_not_hold(tmp_path):
    with pytest.raises(AdapterFailed, match="not in the store"):
        AdapterStore(tmp_path).path("0" * 64)
