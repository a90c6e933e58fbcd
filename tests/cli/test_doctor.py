"""What doctor says of a GPU: which backends, whether they compile, and why not."""

from __future__ import annotations

import pytest
import torch

from openlora.commands import doctor
from openlora.commands.doctor import Finding
from openlora.engine import kernel_check
from openlora.errors import SetupError


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch describe a GPU, on which ``check_kernels`` does as told."""

    def describe(check_kernels):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(kernel_check, "check_kernels", check_kernels)

    return describe


def test_backends_of_a_gpu_that_runs_all_kernels(gpu):
    gpu(lambda *args, **settings: 29)
    assert doctor._backends() == [
        Finding("GPU kernels", "ok", "29 compile for compute 9.0"),
        Finding("attention", "ok", "Triton kernels of this project"),
        Finding("lora", "ok", "Triton kernels of this project (SGMV)"),
    ]


def test_a_kernel_that_does_not_compile_is_missing_with_its_reason(gpu):
    def check_kernels(*args, **settings):
        raise SetupError("the kernel _decode_kernel does not compile")

    gpu(check_kernels)
    assert doctor._backends() == [
        Finding("GPU kernels", "missing", "the kernel _decode_kernel does not compile")
    ]


def test_without_triton_it_is_named(gpu, monkeypatch):
    gpu(lambda *args, **settings: 0)
    monkeypatch.setattr(
        doctor, "missing_packages", lambda names: [name for name in names if name == "triton"]
    )
    assert doctor._backends() == [Finding("GPU kernels", "missing", "pip install triton")]
