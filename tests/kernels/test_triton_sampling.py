"""The Triton greedy choice against the torch one: ties, infinities, NaN, any number of parts."""

from __future__ import annotations

import pytest
import torch

from openlora.kernels import sampling
from openlora.kernels.triton_sampling import GreedyScratch, greedy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("vocab", [1, 63, 5000])
@pytest.mark.parametrize("processors", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_equals_the_reference(rows: int, vocab: int, processors: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # Few distinct values, so that most rows have ties; padded, as a row of a wider buffer.
    logits = torch.randint(-9, 9, (rows, vocab + 3), generator=generator).to(DEVICE, dtype)
    logits = logits[:, :vocab]
    scratch = GreedyScratch(rows, processors, DEVICE)
    for _ in range(2):
        assert torch.equal(greedy(logits, scratch), sampling.greedy(logits))
        assert not scratch.arrived.any()


@pytest.mark.parametrize("processors", [1, 64])
def test_rows_that_are_not_finite_at_their_top_give_minus_one(processors: int) -> None:
    logits = torch.randn(6, 700, device=DEVICE)
    logits[0, 699] = float("nan")
    logits[1, 0] = float("inf")
    logits[2] = float("-inf")
    logits[3] = float("nan")
    logits[4, 5:] = float("-inf")
    expected = sampling.greedy(logits)
    assert expected.tolist()[:4] == [-1, -1, -1, -1]
    out = greedy(logits, GreedyScratch(6, processors, DEVICE))
    assert torch.equal(out, expected)
