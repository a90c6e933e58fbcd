"""A GPU that cannot run the kernels ends the start with one line that says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from openlora.engine import kernel_check
from openlora.engine.kernel_check import check_kernels
from openlora.errors import SetupError
from openlora.kernels.triton_compile import KernelFailed
from openlora.models.dummy import DUMMY_CONFIGS


class Kernel:
    """Loads, or fails as it would on a GPU."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    @property
    def run(self) -> object:
        if self._error is not None:
            raise self._error
        return print


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch describe a GPU of some capability, and ``compile_kernels`` do as told."""

    def describe(compiles, capability=(9, 0)):
        device = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
        monkeypatch.setattr(kernel_check, "compile_kernels", compiles)

    return describe


def check() -> int:
    return check_kernels(
        DUMMY_CONFIGS["1b"],
        torch.bfloat16,
        lora=True,
        block_size=16,
        max_num_seqs=8,
        max_model_len=256,
    )


def test_kernels_that_compile_and_load_are_counted(gpu):
    gpu(lambda *args, **settings: {"_a_kernel": [Kernel(), Kernel()], "_b_kernel": [Kernel()]})
    assert check() == 3


def test_a_gpu_that_is_too_old_is_named(gpu):
    gpu(lambda *args, **settings: {}, capability=(7, 5))
    with pytest.raises(SetupError, match=r"NVIDIA Test has compute capability 7\.5; .* need 8\.0"):
        check()


def test_a_kernel_that_does_not_compile_is_named_with_device_and_versions(gpu):
    def compile_kernels(*args, **settings):
        raise KernelFailed("_decode_kernel", RuntimeError("\nsource\n  PassManager::run failed\n"))

    gpu(compile_kernels)
    with pytest.raises(SetupError) as raised:
        check()
    message = raised.value.message
    assert "\n" not in message
    assert message.startswith("the kernel _decode_kernel does not compile on NVIDIA Test (compute")
    assert f"with torch {torch.__version__}, triton " in message
    assert "RuntimeError: PassManager::run failed; install a Triton that fits" in message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("Failed to find C compiler. Specify one."), "install gcc"),
        (OutOfResources(300_000, 232_448, "shared memory"), "this GPU is too small"),
    ],
)
def test_a_kernel_that_cannot_be_loaded_says_what_to_do(gpu, error, says):
    gpu(lambda *args, **settings: {"_shrink_kernel": [Kernel(error)]})
    with pytest.raises(SetupError, match=rf"kernel _shrink_kernel does not .* {says}"):
        check()
