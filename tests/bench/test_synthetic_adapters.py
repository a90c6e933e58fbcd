"""Adapters made from a seed: PEFT's own format, always the same bytes, no two alike, quickly."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from openlora.adapters.adapter_source import Cancelled
from openlora.adapters.disk_cache import DiskCache
from openlora.adapters.loader import load_adapter
from openlora.adapters.peft_format import inspect_adapter
from openlora.bench.random_adapters import adapter_bytes, write_adapter
from openlora.bench.synthetic_adapters import SyntheticAdapters, on_disk
from openlora.errors import AdapterFailed
from openlora.models.config import read_config
from openlora.models.dummy import DUMMY_CONFIGS
from tests.engine.tiny_model import make_tiny_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(directory)
    return read_config(directory)


def fetched(source, content, directory):
    directory.mkdir()
    source.fetch(content, directory, threading.Event())
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_what_peft_saves(config, tmp_path, dtype):
    source = SyntheticAdapters(config, (4,), 0, dtype)
    content = source.content_hashes([7])[7]
    found = fetched(source, content, tmp_path / "a")
    info = inspect_adapter(found)
    assert info.hash == content
    assert info.size_bytes == source.size_bytes(7)
    other = inspect_adapter(write_adapter(tmp_path / "b", config, rank=4, seed=0, dtype=dtype))
    assert info.tensors == other.tensors
    assert (info.rank, info.targets) == (other.rank, other.targets)
    for tensor in load_file(found / WEIGHTS).values():
        assert tensor.isfinite().all()
        assert 0.005 < tensor.float().std() < 0.05
    load_adapter(found, config, dtype)


def test_the_same_seed_makes_the_same_bytes_and_no_two_numbers_do(config, tmp_path):
    one, again, other = (
        SyntheticAdapters(config, (4, 8), seed, torch.float32) for seed in (1, 1, 2)
    )
    hashes = one.content_hashes(range(2000))
    assert again.content_hashes([1999, 3]) == {number: hashes[number] for number in (3, 1999)}
    assert len(set(hashes.values())) == 2000
    assert other.content_hashes([3])[3] != hashes[3]
    ranks = [inspect_adapter(fetched(one, hashes[n], tmp_path / str(n))).rank for n in range(3)]
    assert ranks == [4, 8, 4]


def test_a_disk_cache_takes_them_as_any_store_s(config, tmp_path):
    source = SyntheticAdapters(config, (4,), 0, torch.float32)
    hashes = source.content_hashes(range(3))
    cache = DiskCache(tmp_path / "cache", source, int(2.5 * source.size_bytes(0)))
    for content in hashes.values():
        cache.ensure(cache.path(content))
    assert cache.stats().adapters == 2
    cache.ensure(cache.path(hashes[0]))


def test_the_disk_begins_with_what_is_drawn_most(config, tmp_path):
    source = SyntheticAdapters(config, (4,), 0, torch.float32)
    paths = on_disk(tmp_path, source, [5, 1, 5, 1, 9, 5], int(2.5 * source.size_bytes(0)))
    assert [path.is_dir() for path in (paths[1], paths[5], paths[9])] == [True, True, False]


def test_what_was_not_asked_for_and_what_nobody_wants(config, tmp_path):
    source = SyntheticAdapters(config, (4,), 0, torch.float32)
    with pytest.raises(AdapterFailed, match="never asked for"):
        source.fetch("0" * 64, tmp_path, threading.Event())
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        source.fetch(source.content_hashes([0])[0], tmp_path, cancelled)


def test_an_adapter_of_a_large_model_takes_no_longer_than_a_copy(tmp_path):
    source = SyntheticAdapters(DUMMY_CONFIGS["8b"], (16,), 0, torch.bfloat16)
    assert source.size_bytes(0) == pytest.approx(
        adapter_bytes(DUMMY_CONFIGS["8b"], 16, 2), rel=0.01
    )
    files = source._files(0)
    started = time.thread_time()
    num_bytes = sum(len(bytes(chunk)) for _, _, chunks in files for chunk in chunks)
    # Over 1 GB/s on one core; a slow machine is given ten times as long.
    assert num_bytes / (time.thread_time() - started) > 1e8
