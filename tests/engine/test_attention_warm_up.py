"""Calling a library before serving: every kind of call once, and its fault is the start's."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from openlora.engine.attention_backends import AttentionChoice
from openlora.engine.attention_warm_up import warm_attention
from openlora.errors import SetupError
from openlora.kernels.flash_attention import FlashAttention4
from openlora.models.dummy import DUMMY_CONFIGS
from tests.engine.flash_libraries import flash4

CONFIG = replace(DUMMY_CONFIGS["1b"], num_layers=2, sliding_window=32, sliding_layers=(True, False))


class Recorded(FlashAttention4):
    """Which calls were made: (phase, rows, window)."""

    def __init__(self) -> None:
        super().__init__(flash4)
        self.calls: list[tuple[str, int, int]] = []

    def prefill(self, q, kv_cache, chunks, scale, *, window=0, soft_cap=0.0):
        self.calls.append(("prefill", len(chunks.context_lens), window))
        return super().prefill(q, kv_cache, chunks, scale, window=window, soft_cap=soft_cap)

    def decode(self, q, kv_cache, tables, lens, scale, *, window=0, soft_cap=0.0):
        self.calls.append(("decode", len(lens), window))
        return super().decode(q, kv_cache, tables, lens, scale, window=window, soft_cap=soft_cap)


def warm(choice: AttentionChoice, max_num_seqs: int = 64) -> None:
    layer = torch.zeros(2, 3, CONFIG.num_kv_heads, 16, CONFIG.head_dim, dtype=torch.float16)
    warm_attention(choice, CONFIG, layer, max_num_seqs=max_num_seqs, max_model_len=100)
    assert not layer.any()


def test_each_phase_and_window_is_called_once():
    library = Recorded()
    warm(AttentionChoice(library, library))
    assert sorted(library.calls) == [
        ("decode", 2, 0),
        ("decode", 2, 32),
        ("prefill", 2, 0),
        ("prefill", 2, 32),
    ]


def test_only_the_phases_that_it_computes():
    library = Recorded()
    warm(AttentionChoice(prefill=library))
    assert {phase for phase, _, _ in library.calls} == {"prefill"}


def test_many_rows_are_another_kernel():
    library = Recorded()
    warm(AttentionChoice(prefill=library), max_num_seqs=512)
    assert {rows for _, rows, _ in library.calls} == {2, 257}


def test_a_library_that_fails_ends_the_start_with_what_to_do():
    def fails(*args: object, **settings: object) -> None:
        raise RuntimeError("ptxas: unknown target sm_130\nand much more")

    library = FlashAttention4(SimpleNamespace(flash_attn_varlen_func=fails))
    with pytest.raises(SetupError) as failed:
        warm(AttentionChoice(decode=library))
    assert failed.value.message == (
        "flash-attn-4 does not run on this GPU (ptxas: unknown target sm_130); set "
        "attention_backend to 'triton'"
    )


def test_triton_needs_no_such_call():
    warm(AttentionChoice())
