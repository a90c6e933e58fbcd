"""The content-addressed store: complete or absent, whatever happens meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from openlora.adapters.peft_format import inspect_adapter
from openlora.adapters.store import AdapterStore
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import PREFIX, edit_config, edit_tensors, write_adapter


def contents(store):
    """Everything in a store's root but its own two files."""
    return sorted(p.name for p in store.iterdir() if p.name not in (".holds", ".lock"))


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
    assert contents(tmp_path / "store") == [info.hash]


def test_the_same_content_twice_is_one(tmp_path):
    store = AdapterStore(tmp_path / "store")
    first = store.put(write_adapter(tmp_path / "a"))
    assert store.put(write_adapter(tmp_path / "b")) == first
    assert contents(tmp_path / "store") == [first.hash]


def test_links_within_the_directory_become_files(tmp_path):
    source = write_adapter(tmp_path / "a")
    (source / "adapter_model.safetensors").rename(source / "blob")
    (source / "adapter_model.safetensors").symlink_to("blob")
    store = AdapterStore(tmp_path / "store")
    info = store.put(source)
    assert not (store.path(info.hash) / "adapter_model.safetensors").is_symlink()


def test_an_unusable_adapter_leaves_nothing(tmp_path):
    source = write_adapter(tmp_path / "a")
    edit_config(source, use_qalora=True)
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(AdapterFailed, match="QALoRA"):
        store.put(source)
    assert list((tmp_path).glob("store/*")) == []


def test_values_that_are_no_numbers_are_refused_by_tensor(tmp_path):
    source = write_adapter(tmp_path / "a", dtype=torch.bfloat16)
    name = f"{PREFIX}.1.self_attn.v_proj.lora_B.weight"
    edit_tensors(source, lambda tensors: tensors[name].view(-1)[5].fill_(float("nan")))
    with pytest.raises(AdapterFailed, match=r"1\.self_attn\.v_proj\.lora_B\.weight holds values"):
        AdapterStore(tmp_path / "store").put(source)
    assert list((tmp_path).glob("store/*")) == []


def test_a_check_refuses_before_anything_is_copied(tmp_path):
    def refuse(layout):
        raise AdapterFailed(f"{len(layout.modules)} modules are too many")

    with pytest.raises(AdapterFailed, match="4 modules are too many"):
        AdapterStore(tmp_path / "store").put(write_adapter(tmp_path / "a"), check=refuse)
    assert not (tmp_path / "store").exists()


def test_only_the_last_holder_deletes(tmp_path):
    source, store = write_adapter(tmp_path / "a"), AdapterStore(tmp_path / "store")
    content = store.put(source, holder="one").hash
    assert store.put(source, holder="other").hash == content
    assert store.held(content) == ("one", "other")
    assert not store.release(content, "nobody")
    assert not store.release(content, "one")
    assert not store.release(content, "one")
    assert store.path(content).is_dir()
    assert store.release(content, "other")
    assert store.held(content) == ()
    with pytest.raises(AdapterFailed, match="not in the store"):
        store.path(content)
    assert store.put(source, holder="one").hash == content
    assert store.path(content).is_dir()


def test_what_its_holder_wants_after_all_stays(tmp_path):
    store = AdapterStore(tmp_path / "store")
    content = store.put(write_adapter(tmp_path / "a"), holder="one").hash
    assert not store.release(content, "one", lambda: True)
    assert store.held(content) == ("one",)
    assert store.path(content).is_dir()


def test_content_without_holders_stays(tmp_path):
    store = AdapterStore(tmp_path / "store")
    content = store.put(write_adapter(tmp_path / "a")).hash
    assert not store.release(content, "one")
    assert store.path(content).is_dir()


def test_put_and_release_at_once_end_with_what_is_held(tmp_path):
    source, store = write_adapter(tmp_path / "a"), AdapterStore(tmp_path / "store")
    content = store.put(source).hash
    errors = []

    def put_and_release(holder):
        try:
            for _ in range(15):
                store.put(source, holder=holder)
                assert inspect_adapter(store.path(content)).hash == content
                store.release(content, holder)
            store.put(source, holder=holder)
        except Exception as error:  # noqa: BLE001 - reported below, in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=put_and_release, args=(f"h{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.held(content) == ("h0", "h1", "h2", "h3")
    assert inspect_adapter(store.path(content)).hash == content
    assert contents(tmp_path / "store") == [content]


def test_what_a_dead_process_left_is_swept(tmp_path):
    store = AdapterStore(tmp_path / "store")
    content = store.put(write_adapter(tmp_path / "a")).hash
    for name in (".incoming-x", f".trash-{content}-1"):
        (tmp_path / "store" / name / "adapter").mkdir(parents=True)
    assert store.sweep() == 0
    assert store.sweep(older_than_s=0) == 2
    assert contents(tmp_path / "store") == [content]


FULL_DISK = """
import resource, sys
from pathlib import Path
from openlora.adapters.store import AdapterStore

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    AdapterStore(Path(sys.argv[2])).put(Path(sys.argv[1]))
except OSError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path):
    source = write_adapter(tmp_path / "a")
    argv = [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path / "store")]
    result = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "File too large" in result.stdout
    assert list((tmp_path / "store").iterdir()) == []


def cut(weights):
    os.truncate(weights, 100)


def flip(weights):
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_adding_again_mends_what_the_disk_has_lost(tmp_path, damage):
    source = write_adapter(tmp_path / "a")
    store = AdapterStore(tmp_path / "store")
    content = store.put(source, holder="here").hash
    damage(store.path(content) / "adapter_model.safetensors")
    store.put(source, holder="there")
    assert inspect_adapter(store.path(content)).hash == content
    assert store.held(content) == ("here", "there")
    assert contents(tmp_path / "store") == [content]


@pytest.mark.parametrize("times_read", [0, 1])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_source_that_cannot_be_read_is_the_adapter_s_fault(
    tmp_path, monkeypatch, name, times_read
):
    """When it is described, or when it is copied then."""
    source = write_adapter(tmp_path / "a")
    opened, times = Path.open, iter(range(2))

    def denied(path, *args, **kwargs):
        if path == source / name and next(times) == times_read:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(AdapterFailed, match=f"cannot be read: .*Permission denied.*{name}"):
        AdapterStore(tmp_path / "store").put(source)
    assert list(tmp_path.glob("store/*")) == []


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
    assert contents(tmp_path / "store") == [results[0].hash]


@pytest.mark.parametrize("name", ["..", "../../etc", "a" * 63, "A" * 64, ""])
def test_what_is_no_hash(tmp_path, name):
    with pytest.raises(AdapterFailed, match="no content hash"):
        AdapterStore(tmp_path).path(name)


def test_a_hash_it_does_not_hold(tmp_path):
    with pytest.raises(AdapterFailed, match="not in the store"):
        AdapterStore(tmp_path).path("0" * 64)


def test_the_hash_is_told_before_the_store_has_anything(tmp_path):
    store, told = AdapterStore(tmp_path / "store"), []

    def announce(content):
        told.append(content)
        assert not (tmp_path / "store" / content).exists()

    assert [store.put(write_adapter(tmp_path / "a"), announce=announce).hash] == told
