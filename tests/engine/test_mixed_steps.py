"""A whole step on the Triton kernels, in the interpreter, against the same step in torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openlora.adapters.extras import AdapterExtras, LinearExtra, TableExtra
from openlora.adapters.lora_set import LoRASet
from openlora.engine.attention_backends import TRITON_ATTENTION, AttentionChoice
from openlora.engine.mixed_steps import MixedSteps
from openlora.engine.step import PENDING_TOKEN, StepRow
from openlora.kernels.flash_attention import (
    FlashAttention,
    FlashAttention2,
    FlashAttention4,
)
from openlora.models.ops import GATE_UP, OUT, QKV
from tests.engine.flash_libraries import flash2, flash4
from tests.engine.step_bench import CONFIG, DEVICE, GREEDY, MIXED, PREFILL, StepBench, lora_set

LIBRARIES = [FlashAttention4(flash4), FlashAttention2(flash2)]


def extras() -> AdapterExtras:
    """Of each kind one."""
    generator = torch.Generator().manual_seed(7)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    return AdapterExtras(
        linears={
            (0, QKV): LinearExtra(some(80), None),
            (1, OUT): LinearExtra(None, some(48)),
            (1, GATE_UP): LinearExtra(some(80), some(80)),
        },
        norms={"model.layers.1.post_attention_layernorm": some(48), "model.norm": some(48)},
        embedding=TableExtra(a=some(64, 4), b=some(4, 48)),
        head=TableExtra(weight=some(64, 48)),
    )


class Bench(StepBench):
    def __init__(self, attention: AttentionChoice = TRITON_ATTENTION) -> None:
        super().__init__()
        self.drawn = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        self.moved: list[torch.Tensor] = []
        self.steps = MixedSteps(
            self.model,
            self.pages,
            self.cache,
            num_processors=1,
            max_num_seqs=4,
            max_model_len=64,
            to_device=self._to_device,
            attention=attention,
        )

    def _to_device(self, array) -> torch.Tensor:
        self.moved.append(torch.from_numpy(array).to(DEVICE))
        return self.moved[-1]

    def compare(self, rows: list[StepRow]) -> torch.Tensor:
        logits = self.steps.logits(rows, {}, self.drawn)
        self.assert_same(logits, rows)
        return logits


@torch.inference_mode()
def test_prefill_then_a_mixed_step() -> None:
    bench = Bench()
    bench.compare(PREFILL)
    logits = bench.compare(MIXED)
    base = bench.compare([replace(row, lora_set=LoRASet.EMPTY) for row in MIXED])
    assert not torch.allclose(base[:1], logits[:1], rtol=1e-2)
    assert logits.shape == (3, 64)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the stand-ins compute on CPU")
@pytest.mark.parametrize("phases", ["prefill", "decode", "prefill and decode"])
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@torch.inference_mode()
def test_steps_on_a_library(library: FlashAttention, phases: str) -> None:
    bench = Bench(
        AttentionChoice(
            prefill=library if "prefill" in phases else None,
            decode=library if "decode" in phases else None,
        )
    )
    bench.compare(PREFILL)
    bench.compare(MIXED)
    bench.compare(MIXED[:2])  # decodes alone


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the stand-ins compute on CPU")
@pytest.mark.parametrize(("library_from", "used"), [(38, True), (39, False)])
@torch.inference_mode()
def test_a_library_gets_the_chunks_of_steps_with_enough_work(library_from, used) -> None:
    class Counted(FlashAttention4):
        calls = 0

        def prefill(self, *args, **settings):
            self.calls += 1
            return super().prefill(*args, **settings)

    library = Counted(flash4)
    bench = Bench(AttentionChoice(prefill=library, library_from=library_from))
    bench.compare(PREFILL)  # 5 tokens, 3 and 2, nothing cached: 25 + 9 + 4
    assert library.calls == (CONFIG.num_layers if used else 0)
    bench.compare(MIXED)  # 3 tokens of 5, and decodes, which do not count
    assert library.calls == (CONFIG.num_layers if used else 0)


@torch.inference_mode()
def test_rows_with_extras_beside_rows_without() -> None:
    bench = Bench()
    with_own = [replace(row, lora_set=replace(row.lora_set, extras=own))
                for row, own in zip(PREFILL, (extras(), None, None), strict=True)]  # fmt: skip
    plain = bench.compare(PREFILL)
    torch.testing.assert_close(bench.compare(with_own), plain)
    own = [with_own[0].lora_set, PREFILL[1].lora_set, PREFILL[2].lora_set]
    rows = [replace(row, lora_set=lora_set) for row, lora_set in zip(MIXED, own, strict=True)]
    logits = bench.compare(rows)
    without = bench.compare(MIXED)
    assert not torch.allclose(logits[:1], without[:1], rtol=1e-2)


@torch.inference_mode()
def test_pending_tokens_come_from_the_last_step() -> None:
    bench = Bench()
    bench.compare(PREFILL)
    expected = bench.compare(MIXED)
    pending = [replace(MIXED[0], token_ids=[PENDING_TOKEN]), *MIXED[1:]]
    bench.drawn[2] = MIXED[0].token_ids[0]
    torch.testing.assert_close(bench.steps.logits(pending, {1: 2}, bench.drawn), expected)


@torch.inference_mode()
def test_without_samples_there_are_no_logits() -> None:
    bench = Bench()
    rows = [replace(row, sampling=None) for row in PREFILL]
    assert bench.steps.logits(rows, {}, bench.drawn).shape == (0, 64)


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_array_begins_at_one_alignment(count: int) -> None:
    bench = Bench()
    seen = []
    bind = bench.steps._bind
    bench.steps._bind = lambda rows, inputs, on_device: (
        seen.append(on_device) or bind(rows, inputs, on_device)
    )
    row = StepRow(1, list(range(count)), 0, [3, 0], lora_set((0, 1.0)), GREEDY)
    bench.steps.logits([row, PREFILL[2]], {}, bench.drawn)
    start = bench.moved[0].data_ptr()
    assert [(part.data_ptr() - start) % 64 for part in seen[0] if part.numel()] == [0] * sum(
        bool(part.numel()) for part in seen[0]
    )
    assert seen[0][7].stride(0) % 16 == 0
