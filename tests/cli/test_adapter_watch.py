"""A watched folder: complete adapters are registered once, changed ones again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from openlora.adapters.store import AdapterStore
from openlora.commands.adapter_watch import AdapterWatch, FolderChanges
from openlora.commands.seed import Skipped, register_dirs
from openlora.errors import SetupError
from openlora.joblog import redis_client
from openlora.registry import AdapterRegistry
from tests.cli.test_seed import HIDDEN, write_adapter


@pytest.fixture
def folder(tmp_path):
    write_adapter(tmp_path / "adapters/old")
    return tmp_path / "adapters"


def names(paths):
    return [path.name for path in paths]


def test_a_folder_is_due_once_it_holds_still(folder):
    changes = FolderChanges(folder)
    assert changes.scan() == changes.scan() == []
    write_adapter(folder / "new")
    assert changes.scan() == []
    weights = folder / "new/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    assert changes.scan() == []
    assert names(changes.scan()) == ["new"]
    assert changes.scan() == []
    weights.write_bytes(weights.read_bytes()[:-1])
    assert changes.scan() == []
    assert names(changes.scan()) == ["new"]
    changes.retry([folder / "new"])
    assert names(changes.scan()) == ["new"]


def test_what_vanished_and_came_back_is_due_again(folder):
    changes = FolderChanges(folder)
    (folder / "old").rename(folder.parent / "away")
    assert changes.scan() == changes.scan() == []
    (folder.parent / "away").rename(folder / "old")
    assert changes.scan() == []
    assert names(changes.scan()) == ["old"]


def test_what_fails_for_a_while_is_said_once_and_tried_again(folder):
    said, warned, calls = [], [], []

    def register(dirs: list[Path]) -> list[Skipped]:
        calls.append(names(dirs))
        if len(calls) < 3:
            raise RedisConnectionError("no Redis")
        return [Skipped("bad", "it is cut short")] if names(dirs) == ["bad"] else []

    watch = AdapterWatch(FolderChanges(folder), register, warned.append, said.append)
    write_adapter(folder / "bad")
    write_adapter(folder / "good")
    for _ in range(6):
        watch.look()
    assert calls == [["bad"], ["bad"], ["bad"], ["good"]]
    assert said == ["Adapter good is registered"]
    assert len(warned) == 2
    assert "no Redis" in warned[0]
    assert warned[1] == "Adapter bad is left out: it is cut short"


@pytest.mark.parametrize("error", [SetupError("no room for it"), RuntimeError("a new fault")])
def test_one_that_cannot_be_taken_over_holds_up_no_other(folder, error):
    said, warned = [], []

    def register(dirs: list[Path]) -> list[Skipped]:
        if names(dirs) == ["bad"]:
            raise error
        return []

    watch = AdapterWatch(FolderChanges(folder), register, warned.append, said.append)
    write_adapter(folder / "bad")
    write_adapter(folder / "good")
    for _ in range(4):
        watch.look()
    assert said == ["Adapter good is registered"]
    assert len(warned) == 1
    assert str(error) in warned[0]


@pytest.mark.services
def test_the_thread_registers_versions(folder, redis_url):
    registry = AdapterRegistry(redis_client(redis_url))
    store = AdapterStore(folder.parent / "store")
    watch = AdapterWatch(
        FolderChanges(folder),
        lambda dirs: register_dirs(dirs, store, registry, {HIDDEN}),
        print,
        print,
    )
    watch.start()
    write_adapter(folder / "poet")
    deadline = time.monotonic() + 30
    while registry.get("poet") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    watch.stop()
    assert [record.id for record in registry.list()] == ["poet"]


def test_a_folder_whose_name_looks_like_a_content_hash_is_watched_as_any_other(tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    changes = FolderChanges(folder)
    named = folder / ("0123456789abcdef" * 4)
    write_adapter(named)
    assert changes.scan() == []
    (named / "adapter_model.safetensors").write_bytes(b"still being copied")
    assert changes.scan() == [], "it changed since the last scan"
    assert changes.scan() == [named]
    (named / "adapter_config.json").write_text("{}")
    changes.scan()
    assert changes.scan() == [named]
