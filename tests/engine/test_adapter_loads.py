"""Background loads: the threads they run in."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import torch

from openlora.engine.adapter_loads import AdapterLoads
from openlora.errors import AdapterFailed


def torch_threads_of_a_new_thread():
    seen = []
    thread = Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_loads_compute_in_one_thread_and_all_other_threads_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen = []

    def load(path):
        torch.ones(1 << 20).sum()
        seen.append(torch.get_num_threads())
        raise AdapterFailed(f"{path} is no adapter")

    try:
        loads = AdapterLoads(load, num_threads=2)
        for key in ("a", "b"):
            loads.start(key, Path(key))
        while loads.num_loading:
            loads.poll(1)
        loads.close()
        assert seen == [1, 1]
        assert torch.get_num_threads() == 3
        assert torch_threads_of_a_new_thread() == 3
    finally:
        torch.set_num_threads(before)
