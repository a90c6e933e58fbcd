"""The benchmarks of kernels say what they need."""

from __future__ import annotations

import argparse

import pytest
import torch

from openlora.bench import attention, kernels
from openlora.errors import SetupError


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
@pytest.mark.parametrize("benchmark", [kernels, attention])
def test_without_a_gpu_it_says_so(benchmark) -> None:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    with pytest.raises(SetupError, match="CUDA"):
        benchmark.run(parser.parse_args([]))
