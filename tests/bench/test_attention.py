"""The attention benchmark's cases are steps as the engine has them."""

from __future__ import annotations

import pytest
import torch

from openlora.bench.attention import CASES, Case
from openlora.engine.attention_backends import AttentionChoice
from openlora.kernels.flash_attention import FlashAttention2, FlashAttention4
from openlora.models.dummy import DUMMY_CONFIGS
from tests.engine.flash_libraries import flash2, flash4


@pytest.mark.parametrize("phase", sorted({phase for phase, _, _ in CASES}))
def test_both_libraries_compute_the_same_of_a_case(phase: str) -> None:
    case = Case(DUMMY_CONFIGS["1b"], phase, 3, 20, 16, device="cpu")
    ours, theirs = (
        case.attend(case.caches[0], AttentionChoice(library, library))
        for library in (FlashAttention4(flash4), FlashAttention2(flash2))
    )
    tokens = 3 if phase == "decode" else 60
    assert ours.shape == (tokens, 2048)
    assert not ours.isnan().any()
    torch.testing.assert_close(ours, theirs)
