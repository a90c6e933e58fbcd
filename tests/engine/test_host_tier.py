"""The host tier: its memory is handed out once at a time, and adapters stay while there is room."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openlora.engine.host_tier import Extents, HostMemory, HostTier
from openlora.errors import AdapterFailed, SetupError


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3000)), max_size=60))
def test_parts_never_overlap_and_come_back(moves):
    extents, taken = Extents(8192), []
    for takes, number in moves:
        if takes or not taken:
            start = extents.take(number)
            if start is None:
                # Only where no gap is large enough, which an empty range always is.
                assert taken
            else:
                taken.append(start)
        else:
            extents.give_back(taken.pop(number % len(taken)))
        extents.check_integrity()
    for start in taken:
        extents.give_back(start)
    assert extents.take(8192) == 0


def test_more_memory_than_any_machine_has_is_refused_in_words():
    with pytest.raises(SetupError, match=r"does not give \d+ MiB for adapters in host memory"):
        HostMemory(1 << 60, pin=False)


def test_memory_is_free_again_when_the_last_view_is_gone():
    memory = HostMemory(1024, pin=False)
    part = memory.empty(1024)
    assert part is not None
    view = part.view(torch.float32)[3:]
    del part
    assert memory.empty(1) is None
    view.fill_(1)
    del view
    gc.collect()
    assert memory.empty(1024) is not None


class Files:
    """Adapter directories and a loader that counts; an adapter is one tensor of its file's size."""

    def __init__(self, root: Path) -> None:
        self.root, self.reads = root, []

    def write(self, name: str, num_bytes: int) -> Path:
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / "weights").write_bytes(b"x" * num_bytes)
        return self.root / name

    def load(self, path, zeros):
        self.reads.append(path.name)
        if path.name == "broken":
            raise AdapterFailed("broken")
        return zeros(((path / "weights").stat().st_size,), torch.uint8)


def test_adapters_are_read_once_while_there_is_room(tmp_path):
    files = Files(tmp_path)
    tier = HostTier(files.load, HostMemory(2048, pin=False))
    a, b, c = (files.write(name, 1024) for name in "abc")
    assert tier.cached(a) is None
    assert tier.load(a) is tier.load(a) is tier.cached(a)
    tier.load(b)
    tier.cached(a)
    tier.load(c)  # takes b's place, which is the longest unused
    assert tier.cached(b) is None
    assert tier.cached(a) is not None
    assert tier.cached(c) is not None
    assert files.reads == ["a", "b", "c"]


def test_changed_files_are_another_adapter_and_missing_ones_none(tmp_path):
    files = Files(tmp_path)
    tier = HostTier(files.load, HostMemory(4096, pin=False))
    path = files.write("a", 100)
    assert tier.load(path).numel() == 100
    files.write("a", 200)
    assert tier.cached(path) is None
    assert tier.load(path).numel() == 200
    (path / "weights").unlink()
    assert tier.cached(path) is None


def test_what_somebody_holds_keeps_its_memory(tmp_path):
    files = Files(tmp_path)
    tier = HostTier(files.load, HostMemory(1024, pin=False))
    held = tier.load(files.write("a", 1024))
    held.fill_(7)
    other = tier.load(files.write("b", 1024))  # no room: it lives elsewhere
    other.fill_(9)
    assert bool((held == 7).all())
    del held
    del other
    gc.collect()
    assert tier.load(files.write("c", 1024)).numel() == 1024


def test_a_load_that_fails_leaves_nothing(tmp_path):
    files = Files(tmp_path)
    tier = HostTier(files.load, HostMemory(1024, pin=False))
    with pytest.raises(AdapterFailed):
        tier.load(files.write("broken", 10))
    assert len(tier) == 0


def test_no_memory_at_all_still_loads(tmp_path):
    files = Files(tmp_path)
    tier = HostTier(files.load, HostMemory(0, pin=False))
    assert tier.load(files.write("a", 10)).numel() == 10


def test_a_file_rewritten_in_place_with_its_old_times_is_another_adapter(tmp_path):
    files = Files(tmp_path)
    tier = HostTier(files.load, HostMemory(4096, pin=False))
    path = files.write("a", 100)
    before = (path / "weights").stat()
    tier.load(path)
    with (path / "weights").open("r+b") as file:
        file.write(b"y")
    os.utime(path / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tier.cached(path) is None


def test_what_changes_while_it_is_read_is_not_kept(tmp_path):
    files = Files(tmp_path)

    def load(path, zeros):
        loaded = files.load(path, zeros)
        files.write(path.name, 300)
        return loaded

    tier = HostTier(load, HostMemory(4096, pin=False))
    path = files.write("a", 100)
    assert tier.load(path).numel() == 100
    assert tier.cached(path) is None


def test_what_found_no_room_is_not_kept_beyond_the_budget(tmp_path):
    files = Files(tmp_path)
    tier = HostTier(files.load, HostMemory(1024, pin=False))
    tier.load(files.write("large", 2000))
    assert len(tier) == 0
    beside = HostTier(files.load, HostMemory(1024, pin=False), beside=lambda loaded: 600)
    beside.load(files.write("a", 10))
    beside.load(files.write("b", 10))
    assert beside.cached(tmp_path / "a") is None
    assert beside.cached(tmp_path / "b") is not None


def test_it_counts_what_it_does(tmp_path):
    files = Files(tmp_path)
    tier = HostTier(files.load, HostMemory(2048, pin=False))
    paths = [files.write(name, 1024) for name in "abc"]
    for path in paths:
        tier.load(path)
    tier.cached(paths[2])
    with pytest.raises(AdapterFailed):
        tier.load(files.write("broken", 10))
    stats = tier.stats({paths[2]: "c"})
    assert (stats.tier, stats.adapters, stats.names) == ("host", 2, ("c",))
    assert (stats.hits, stats.loads, stats.failures, stats.evictions) == (1, 3, 1, 1)
    assert (stats.bytes_used, stats.bytes_limit) == (2048, 2048)
