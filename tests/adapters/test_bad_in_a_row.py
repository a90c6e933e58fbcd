"""Bad adapters one after the other: each refused by name, and nothing of them stays."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import tracemalloc

import pytest
import torch

from openlora.adapters.store import AdapterStore
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import PREFIX, edit_config, edit_tensors, write_adapter

WEIGHTS = "adapter_model.safetensors"
Q = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"


def cut(directory):
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def flip_a_bit_of_the_header(directory):
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[40] ^= 0x20
    (directory / WEIGHTS).write_bytes(data)


def be_a_pickle(directory):
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({}))


def lead_out(directory):
    (directory / WEIGHTS).rename(directory.parent / f"{directory.name}-out")
    (directory / WEIGHTS).symlink_to(directory.parent / f"{directory.name}-out")


def name_a_shard_elsewhere(directory):
    (directory / WEIGHTS).unlink()
    (directory / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "/etc/passwd"}}')


DAMAGE = {
    cut: "holds .* bytes of data; its header describes",
    flip_a_bit_of_the_header: ".+",
    be_a_pickle: "is a pickle file",
    lead_out: "is a link out of",
    name_a_shard_elsewhere: "names the file '/etc/passwd'",
    lambda d: edit_tensors(d, lambda t: t[Q].view(-1)[7].fill_(float("nan"))): "q_proj.lora_A",
    lambda d: edit_tensors(d, lambda t: t.update({Q: torch.zeros(4, 24, 1)})): "must be 2-D",
    lambda d: edit_config(d, r=5): "gives it rank 5",
    lambda d: edit_config(d, peft_type="LOHA"): "peft_type is LOHA",
    lambda d: (d / "adapter_config.json").write_text("[" * 9999): "is no JSON",
}


@pytest.fixture
def bad(tmp_path):
    directories = {}
    for number, (damage, says) in enumerate(DAMAGE.items()):
        directory = write_adapter(tmp_path / f"bad{number}")
        damage(directory)
        directories[directory] = says
    return directories


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_bad_adapters_in_a_row_leave_nothing(bad, tmp_path, rounds):
    good, store = write_adapter(tmp_path / "good"), AdapterStore(tmp_path / "store")
    content = store.put(good, holder="here").hash

    def one_round():
        for directory, says in bad.items():
            with pytest.raises(AdapterFailed, match=says):
                store.put(directory, holder="here")

    one_round()
    open_files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    tracemalloc.start()
    for _ in range(rounds):
        one_round()
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 500_000
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert threading.active_count() == threads
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        ".holds",
        ".lock",
        content,
    ]
    assert store.put(good, holder="here").hash == content
