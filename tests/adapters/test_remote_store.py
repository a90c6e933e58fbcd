"""A store behind a URL: the same contract for every package, and servers that misbehave."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import pytest

from openlora.adapters import remote_store
from openlora.adapters.adapter_source import Cancelled
from openlora.adapters.disk_cache import DiskCache
from openlora.adapters.peft_format import inspect_adapter
from openlora.adapters.remote_store import RemoteStore
from openlora.adapters.store import AdapterStore
from openlora.adapters.stores import cache_of, is_url, open_store, store_setting
from openlora.errors import AdapterFailed, SetupError
from tests.adapters.peft_dirs import write_adapter
from tests.adapters.serving import serving

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=["file", "memory", "s3", pytest.param("gs", marks=pytest.mark.long)])
def store(request, tmp_path):
    if request.param in ("s3", "gs"):
        bucket = request.getfixturevalue(f"{request.param}_bucket")
        yield RemoteStore(f"{bucket}/far", tmp_path / "cache")
        return
    url = f"file://{tmp_path}/far" if request.param == "file" else "memory://far"
    yield RemoteStore(url, tmp_path / "cache")
    system = fsspec.filesystem("memory")
    if system.exists("/far"):
        system.rm("/far", recursive=True)


def cached(store):
    return DiskCache(store.scratch, store, 1 << 30, back_off_s=(0.001,))


def test_what_is_put_is_listed_fetched_and_deleted(store, tmp_path):
    adapter = write_adapter(tmp_path / "a")
    assert store.contents() == []
    info = store.put(adapter, holder="here")
    assert info == inspect_adapter(adapter)
    assert store.contents() == [info.hash]
    assert store.held(info.hash) == ("here",)
    cache = cached(store)
    cache.ensure(store.path(info.hash))
    assert inspect_adapter(store.path(info.hash)).hash == info.hash
    assert store.release(info.hash, "here")
    assert not store.release(info.hash, "here")
    assert store.contents() == []
    shutil.rmtree(store.path(info.hash))
    with pytest.raises(AdapterFailed, match=r"is not in the store \w+://.*add it again"):
        cache.ensure(store.path(info.hash))


def test_content_goes_with_its_last_holder(store, tmp_path):
    adapter = write_adapter(tmp_path / "a")
    content = store.put(adapter, holder="here").hash
    assert store.put(adapter, holder="there").hash == content
    assert not store.release(content, "here")
    assert store.contents() == [content]
    assert store.release(content, "there")
    assert store.contents() == []


def test_what_its_holder_wants_after_all_stays(store, tmp_path):
    content = store.put(write_adapter(tmp_path / "a"), holder="here").hash
    assert not store.release(content, "here", lambda: True)
    assert store.held(content) == ("here",)
    assert store.contents() == [content]


def test_nothing_of_a_bad_adapter_is_stored(store, tmp_path):
    adapter = write_adapter(tmp_path / "a")
    (adapter / WEIGHTS).write_bytes(b"x")
    with pytest.raises(AdapterFailed, match="cut short"):
        store.put(adapter, holder="here")
    assert store.contents() == []


def test_an_upload_that_was_cut_off_is_made_whole_by_the_next(store, tmp_path):
    adapter = write_adapter(tmp_path / "a")
    content = store.put(adapter).hash
    store._system.rm_file(store._at(content, "adapter_config.json"))
    with pytest.raises(AdapterFailed, match="is not in the store"):
        cached(store).ensure(store.path(content))
    store.put(adapter)
    cached(store).ensure(store.path(content))


@pytest.mark.parametrize("damage", [lambda data: b"short", lambda data: data[:-1] + b"\x7f"])
def test_adding_again_mends_a_file_that_was_cut_or_changed(store, tmp_path, damage):
    adapter = write_adapter(tmp_path / "a")
    content = store.put(adapter).hash
    damaged = damage((adapter / WEIGHTS).read_bytes())
    assert damaged != (adapter / WEIGHTS).read_bytes()
    store._system.pipe_file(store._at(content, WEIGHTS), damaged)
    with pytest.raises(AdapterFailed, match="gives other bytes"):
        cached(store).ensure(store.path(content))
    store.put(adapter)
    cached(store).ensure(store.path(content))


def test_what_is_sound_is_not_stored_again_nor_read_where_the_store_has_checksums(
    store, tmp_path, monkeypatch
):
    adapter = write_adapter(tmp_path / "a")
    store.put(adapter)
    opened = []
    system_open = store._system.open
    monkeypatch.setattr(
        store._system, "open", lambda *args: opened.append(args) or system_open(*args)
    )
    monkeypatch.setattr(store._system, "put_file", None)
    store.put(adapter)
    has_checksums = store.url.startswith(("s3://", "gs://"))
    assert len(opened) == (0 if has_checksums else len(list(adapter.iterdir())))


def test_what_the_store_cannot_read_is_stored_again(store, tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "a")
    content = store.put(adapter).hash

    store._system.pipe_file(store._at(content, WEIGHTS), bytes((adapter / WEIGHTS).stat().st_size))
    system_open = store._system.open

    def fail(path, mode="rb", **settings):
        if mode == "rb":
            raise RuntimeError("checksum mismatch")
        return system_open(path, mode, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(store._system, "open", fail)
        store.put(adapter)
    cached(store).ensure(store.path(content))


class Handler(http.server.SimpleHTTPRequestHandler):
    wait_s = 0.0
    status = 0

    def do_GET(self):
        time.sleep(self.wait_s)
        if self.status:
            self.send_error(self.status)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path):
    """A server of a store's directory, its URL, and how it behaves."""
    handler = type("Served", (Handler,), {})
    AdapterStore(tmp_path / "site").sweep()
    (tmp_path / "site").mkdir()
    serve = partial(handler, directory=str(tmp_path / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield AdapterStore(tmp_path / "site"), f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_web_server_is_a_store_to_read(site, tmp_path):
    behind, url, _ = site
    content = behind.put(write_adapter(tmp_path / "a")).hash
    store = RemoteStore(url, tmp_path / "cache")
    cached(store).ensure(store.path(content))
    with pytest.raises(AdapterFailed, match="can only be read"):
        store.put(write_adapter(tmp_path / "b", rank=8), holder="here")


def test_a_server_that_fails_is_named(site, tmp_path):
    behind, url, handler = site
    content = behind.put(write_adapter(tmp_path / "a")).hash
    handler.status = 503
    store = RemoteStore(url, tmp_path / "cache")
    with pytest.raises(AdapterFailed, match=r"127\.0\.0\.1.* does not give adapter .*503"):
        cached(store).ensure(store.path(content))
    handler.status = 0
    cached(store).ensure(store.path(content))


def test_a_slow_server_is_given_up_in_time(site, tmp_path):
    behind, url, handler = site
    content = behind.put(write_adapter(tmp_path / "a")).hash
    handler.wait_s = 0.1
    store = RemoteStore(url, tmp_path / "cache", timeout_s=0.05)
    with pytest.raises(AdapterFailed, match=r"not read within 0\.05 s"):
        cached(store).ensure(store.path(content))
    cancelled = threading.Event()
    cancelled.set()
    (tmp_path / "into").mkdir()
    with pytest.raises(Cancelled):
        store.fetch(content, tmp_path / "into", cancelled)


class Endless(http.server.BaseHTTPRequestHandler):
    """Its weights never end."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path.endswith(WEIGHTS):
                while True:
                    self.wfile.write(bytes(1 << 16))
            self.wfile.write(b"{}")

    def log_message(self, *args):
        pass


def test_a_store_without_end_takes_no_more_than_the_cache_s_budget(tmp_path):
    with serving(Endless) as url:
        store = RemoteStore(url, tmp_path / "cache", max_bytes=5 << 20)
        into = tmp_path / "into"
        into.mkdir()
        with pytest.raises(AdapterFailed, match="gives more than 5242880 bytes"):
            store.fetch("0" * 64, into, threading.Event())
    assert sum(path.stat().st_size for path in into.iterdir()) <= 5 << 20


def test_nobody_there(tmp_path):
    store = RemoteStore("http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(AdapterFailed, match="does not give adapter"):
        cached(store).ensure(store.path("0" * 64))


def test_what_a_setting_names(tmp_path):
    url = "s3://bucket/adapters"
    assert store_setting(None, {"OPENLORA_ADAPTERS": url}) == url
    assert store_setting(None, {"OPENLORA_ADAPTERS": "/a/folder", "HOME": "/h"}) != "/a/folder"
    assert store_setting(None, {"OPENLORA_ADAPTERS": url, "OPENLORA_STORE": "/s"}) == Path("/s")
    assert is_url(url)
    assert not is_url(tmp_path)
    assert isinstance(open_store(tmp_path, tmp_path), AdapterStore)
    opened = open_store("memory://x", tmp_path)
    assert opened.path("a" * 64) == cache_of("memory://x", tmp_path) / ("a" * 64)
    with pytest.raises(AdapterFailed, match="no content hash"):
        opened.path("../x")
    with pytest.raises(SetupError, match="cannot be opened"):
        open_store("nonsense://x", tmp_path)


def test_a_url_is_shown_without_its_password(tmp_path):
    assert RemoteStore("http://me:secret@host/x?key=1", tmp_path).name == "http://host/x"


def test_what_a_dead_process_left_on_its_way_is_swept(tmp_path):
    store = RemoteStore(f"file://{tmp_path}/far", tmp_path / "cache")
    left = store.scratch / ".incoming-x" / "adapter"
    left.mkdir(parents=True)
    assert store.sweep() == 0
    os.utime(left.parent, (0, 0))
    assert store.sweep() == 1
    assert list(store.scratch.iterdir()) == []


@pytest.mark.parametrize("holder", ["there", "here"])
def test_content_that_is_put_while_its_last_holder_lets_go_is_there_afterwards(
    store, tmp_path, holder
):
    """At each request that the deletion makes of the store, another process puts it again, for
    another registry or for the same."""
    adapter = write_adapter(tmp_path / "a")
    other = RemoteStore(store.url, tmp_path / "other")
    for stop_at in range(30):
        content = store.put(adapter, holder="here").hash
        other.release(content, "there")
        putting, calls, announced = [], [], []

        def counted(
            call, *args, stop_at=stop_at, putting=putting, calls=calls, announced=announced
        ):
            if len(calls) == stop_at:
                thread = threading.Thread(
                    target=other.put,
                    args=(adapter,),
                    kwargs={"holder": holder, "announce": announced.append},
                )
                putting.append(thread)
                thread.start()
                thread.join(0.1)
            calls.append(call)
            return call(*args)

        with pytest.MonkeyPatch.context() as patch:
            for name in ("exists", "pipe_file", "rm_file", "ls", "rmdir"):
                at_store = getattr(store._system, name)
                mine = threading.get_ident()

                def call(*args, at_store=at_store, mine=mine, **kwargs):
                    if threading.get_ident() != mine:
                        return at_store(*args, **kwargs)
                    return counted(lambda: at_store(*args, **kwargs))

                patch.setattr(store._system, name, call)
            is_own = holder == "here"
            store.release(content, "here", lambda a=announced, own=is_own: own and bool(a))
        if not putting:
            break
        putting[0].join()
        assert other.held(content) == (holder,), stop_at
        assert other._is_whole(adapter_named(tmp_path, adapter, content)), stop_at
    assert stop_at > 6


def adapter_named(tmp_path, adapter, content):
    """``adapter`` in a folder of its hash's name."""
    named = tmp_path / "named" / content
    if not named.exists():
        shutil.copytree(adapter, named)
    return named


def test_a_deletion_whose_process_died_holds_nobody_up_for_ever(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_store, "DELETION_S", 0.2)
    adapter = write_adapter(tmp_path / "a")
    content = inspect_adapter(adapter).hash
    store._mark(".deletions", content, "dead")
    store.put(adapter, holder="here")
    assert store.held(content) == ("here",)
    assert store._list(".deletions", content) == []


def test_the_hash_is_told_before_the_store_has_anything(store, tmp_path):
    adapter = write_adapter(tmp_path / "a")
    told = []

    def announce(content):
        told.append(content)
        assert store.contents() == []
        assert store.held(content) == ()

    content = store.put(adapter, holder="here", announce=announce).hash
    assert told == [content]
