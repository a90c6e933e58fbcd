"""Memory limits of containers, read from made-up file systems."""

from __future__ import annotations

import os

import pytest

from openlora.engine.host_memory import available_memory, cgroup_rooms

GIB = 1 << 30


@pytest.fixture
def tree(tmp_path):
    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_version_2_own_group_and_its_parents(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
            "sys/fs/cgroup/pod/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
            "sys/fs/cgroup/pod/app/memory.max": "max\n",
            "sys/fs/cgroup/pod/app/memory.current": f"{GIB}\n",
        }
    )
    assert cgroup_rooms(root) == [GIB + GIB // 2]


def test_version_2_in_a_container_that_sees_its_own_group_on_top(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/\n",
            "proc/meminfo": "MemTotal:  9000000 kB\nMemAvailable:  8000000 kB\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB // 4}\n",
        }
    )
    assert cgroup_rooms(root) == [GIB - GIB // 4]
    assert available_memory(root) == GIB - GIB // 4


def test_version_1_whose_path_is_not_mounted(tree):
    root = tree(
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        }
    )
    assert cgroup_rooms(root) == [0]


def test_no_limit_leaves_what_the_machine_has(tree):
    root = tree(
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
        }
    )
    assert cgroup_rooms(root) == []
    assert cgroup_rooms(root / "nothing") == []
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_memory(root / "nothing") == physical
    assert 0 < available_memory() < physical
