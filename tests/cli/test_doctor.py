"""What doctor says of a GPU: which backends, whether they compile, and why not."""

from __future__ import annotations

import pytest
import torch

from openlora.commands import doctor
from openlora.commands.doctor import Finding
from openlora.engine import kernel_check
from openlora.errors import SetupError
from tests.engine.flash_libraries import install


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
        Finding(
            "attention",
            "optional",
            "flash-attn-4: it is not installed: pip install 'openlora[flash]'",
        ),
        Finding(
            "attention",
            "optional",
            "flash-attn-2: it is not installed (pip install flash-attn, which compiles it), and "
            "its paged cache needs blocks of 256, and block_size is 16; set block_size to 256",
        ),
        Finding("lora", "ok", "Triton kernels of this project (SGMV)"),
    ]


def test_a_library_that_is_installed_and_not_used_says_why(gpu, tmp_path, monkeypatch):
    gpu(lambda *args, **settings: 29)
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "flash-attn", "2.8.3")
    (remark,) = [finding for finding in doctor._backends() if "2.8.3" in finding.detail]
    assert remark == Finding(
        "attention",
        "optional",
        "flash-attn-2 2.8.3 found, not used: its paged cache needs blocks of 256, and block_size "
        "is 16; set block_size to 256",
    )


def test_a_library_that_is_used_is_shown_with_what_for(gpu, tmp_path, monkeypatch):
    gpu(lambda *args, **settings: 29)
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "flash-attn-4", "4.0.0b36")
    shown = "prefill flash-attn-4 for long prompts, triton otherwise; decode triton"
    assert Finding("attention", "ok", shown) in doctor._backends()


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
