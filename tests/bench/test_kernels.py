"""The kernel benchmark says what it needs."""

from __future__ import annotations

import argparse

import pytest
import torch

from openlora.bench import kernels
from openlora.errors import SetupError


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_without_a_gpu_it_says_so() -> None:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    with pytest.raises(SetupError, match="CUDA"):
        kernels.run(parser.parse_args([]))
