"""What is checked before a start, and where things go: each failure is one line with a way out."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys

import pytest

from openlora.commands.checks import (
    check_memory,
    check_port,
    missing_packages,
    weights_in_memory,
)
from openlora.commands.config import add_up_arguments, up_config
from openlora.commands.instance import InstanceDir
from openlora.commands.placement import visible_gpus, worker_environments
from openlora.errors import SetupError
from openlora.local import free_port


def up(*words):
    parser = argparse.ArgumentParser()
    add_up_arguments(parser)
    return up_config(parser.parse_args(words), {})


def test_a_port_in_use_is_named_with_another_to_try():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SetupError) as raised:
            check_port("127.0.0.1", port)
    assert f"port {port} of 127.0.0.1 cannot be used" in raised.value.message
    assert "--port" in raised.value.message
    check_port("127.0.0.1", free_port())


def test_a_host_that_is_none_is_named():
    with pytest.raises(SetupError, match="host is 'no such host'; it cannot be resolved"):
        check_port("no such host", 8000)


def test_too_little_memory_is_told_with_both_numbers(monkeypatch):
    monkeypatch.setattr("openlora.commands.checks.available_memory", lambda: 10**9)

    with pytest.raises(SetupError) as raised:
        check_memory(up("--workers", "2"), 10**9)
    assert raised.value.message.startswith("1.0 GB of memory are free and about 3.")


def test_weights_count_as_they_lie_in_memory(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(1000))
    (tmp_path / "b.safetensors").write_bytes(bytes(500))
    assert weights_in_memory(tmp_path, up("--device", "cpu")) == 3000
    assert weights_in_memory(tmp_path, up("--device", "cpu", "--dtype", "bfloat16")) == 1500
    assert weights_in_memory(tmp_path, up("--device", "cuda")) == 0


def test_missing_packages_are_found_without_importing():
    assert missing_packages(["json", "no_such_package"]) == ["no_such_package"]


def test_an_instance_has_one_owner_and_its_own_folder(tmp_path):
    first = InstanceDir(tmp_path, 8000, "owner/llama")
    holder = (
        "import sys; from pathlib import Path; from openlora.commands.instance import InstanceDir\n"
        "InstanceDir(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    )

    def take(port, model):
        return subprocess.run(
            [sys.executable, "-c", holder, str(tmp_path), port, model],
            capture_output=True,
            text=True,
            check=False,
        )

    assert (
        "another `openlora up` with this model and port 8000" in take("8000", "owner/llama").stderr
    )
    assert take("8001", "owner/llama").returncode == 0
    assert take("8000", "other/llama").returncode == 0
    assert len(list(tmp_path.iterdir())) == 3
    assert first.path.name.startswith("8000-llama-")


def test_workers_share_gpus_round_robin():
    places = worker_environments(3, "auto", {}, ["0", "1"])
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1", "0"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,3"}) == ["2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_workers_without_a_gpu_share_the_cores():
    places = worker_environments(2, "cpu", {}, ["0"])
    assert len(places) == 2
    assert all(int(place["OMP_NUM_THREADS"]) >= 1 for place in places)
    assert worker_environments(2, "cpu", {"OMP_NUM_THREADS": "7"}, []) == [{}, {}]
    assert worker_environments(1, "auto", {}, ["0", "1"]) == [{}]
