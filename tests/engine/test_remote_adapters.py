"""An engine whose adapters lie in a store behind a URL."""

from __future__ import annotations

import shutil
import threading

import pytest

from openlora.adapters.remote_store import RemoteStore
from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from openlora.errors import AdapterFailed
from tests.engine.tiny_model import ADAPTERS, make_adapters, make_tiny_model

NAMES = list(ADAPTERS)[:2]
PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
WEIGHTS = {NAMES[0]: 1.0}
BOTH = {NAMES[0]: 0.5, NAMES[1]: 0.5}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A model, adapters, and the tokens of an engine that has them on its disk."""
    root = tmp_path_factory.mktemp("local")
    make_tiny_model(root / "model")
    paths = make_adapters(root / "model", root, {name: ADAPTERS[name] for name in NAMES})
    engine = Engine(EngineConfig(str(root / "model"), device="cpu"))
    for name in NAMES:
        engine.register_adapter(name, paths[name])
    tokens = [done.token_ids for done in engine.generate(requests())]
    engine.close()
    return root, paths, tokens


def requests():
    return [Request([5, 9, 7], weights, PARAMS) for weights in (WEIGHTS, BOTH, {})]


@pytest.fixture
def far(local, tmp_path):
    """A store with the adapters, and an engine that has none of them yet."""
    root, paths, _ = local
    store = RemoteStore(f"file://{tmp_path}/far", tmp_path / "cache")
    contents = {name: store.put(paths[name]).hash for name in NAMES}
    engine = Engine(
        EngineConfig(
            str(root / "model"),
            device="cpu",
            adapter_store=store.url,
            adapter_disk_dir=str(store.scratch),
        )
    )
    for name, content in contents.items():
        engine.register_adapter(name, store.path(content))
    yield store, contents, engine
    engine.close()


def tier(engine, name):
    return next(stats for stats in engine.stats().tiers if stats.tier == name)


def test_they_are_fetched_and_give_the_same_tokens(local, far):
    store, contents, engine = far
    assert tier(engine, "disk").adapters == 0
    assert [done.token_ids for done in engine.generate(requests())] == local[2]
    assert tier(engine, "disk").loads == 2
    assert set(tier(engine, "device").names) == set(NAMES)
    assert {path.name for path in store.scratch.iterdir()} >= set(contents.values())
    shutil.rmtree(store.url.removeprefix("file://"))  # the store is gone: they are here
    assert [done.token_ids for done in engine.generate(requests())] == local[2]


def test_a_pinned_one_is_fetched_and_put_into_pages_without_a_request(far):
    _, _, engine = far
    engine.pin_adapters(NAMES[:1])
    while engine.take_loads():
        pass
    assert engine.stats().resident_adapters == tuple(NAMES[:1])


def test_one_that_the_store_lacks_fails_alone(local, far):
    store, contents, engine = far
    shutil.rmtree(store.url.removeprefix("file://") + f"/{contents[NAMES[1]]}")
    one, both, base = engine.generate(requests())
    assert (one.token_ids, base.token_ids) == (local[2][0], local[2][2])
    assert isinstance(both.error, AdapterFailed)
    assert "is not in the store file://" in both.error.message
    engine.check_integrity()


def test_a_merge_fetches_its_parts(local, far):
    from openlora.adapters.merge_spec import MergeSpec

    _, _, engine = far
    (done,) = engine.generate([Request([5, 9], BOTH, PARAMS, merge=MergeSpec("svd"))])
    assert done.error is None
    assert tier(engine, "disk").loads == 2


def test_what_is_in_memory_needs_neither_disk_nor_store(local, far):
    store, contents, engine = far
    first = engine.generate(requests())
    for name in NAMES:
        shutil.rmtree(store.path(contents[name]))
    shutil.rmtree(store.url.removeprefix("file://"))
    engine.unload_adapter(NAMES[0])  # its pages go; the copy in memory stays
    engine.register_adapter(NAMES[0], store.path(contents[NAMES[0]]))
    again = engine.generate(requests())
    assert [done.error for done in again] == [None] * 3
    assert [done.token_ids for done in again] == [done.token_ids for done in first]


def test_a_copy_that_was_cut_short_is_fetched_anew(local, far):
    store, contents, engine = far
    engine._files._cache.ensure(store.path(contents[NAMES[0]]))
    weights = store.path(contents[NAMES[0]]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert [done.token_ids for done in engine.generate(requests())] == local[2]


def test_a_merge_of_a_copy_with_other_bytes_fetches_it_anew(far):
    from openlora.adapters.merge_spec import MergeSpec

    store, contents, engine = far
    wanted = Request([5, 9], BOTH, PARAMS, merge=MergeSpec("svd"))
    engine._files._cache.ensure(store.path(contents[NAMES[0]]))
    weights = store.path(contents[NAMES[0]]) / "adapter_model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-4] + b"\1\2\3\4")
    (done,) = engine.generate([wanted])
    assert done.error is None
    assert weights.read_bytes() == right


def test_one_that_is_evicted_before_it_is_read_is_fetched_again_in_no_loader_thread(local, far):
    _, _, engine = far
    cache, fetched_in = engine._files._cache, []
    ensure = cache.ensure

    def ensure_and_lose(path, *args):
        ensure(path, *args)
        fetched_in.append(threading.current_thread().name)
        if len(fetched_in) == 1:
            shutil.rmtree(path)  # as another process's eviction would

    cache.ensure = ensure_and_lose
    assert [done.token_ids for done in engine.generate(requests())] == local[2]
    assert set(fetched_in) == {"adapter-fetch"}
    assert len(fetched_in) == 3
