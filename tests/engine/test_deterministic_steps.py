"""Deterministic steps on the Triton kernels, in the interpreter: rows do not see each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from openlora.adapters.extras import AdapterExtras
from openlora.adapters.lora_set import LoRASet
from openlora.adapters.page_tensors import PageTensors
from openlora.engine.config import EngineConfig
from openlora.engine.engine import Engine
from openlora.engine.kv_cache import KVCache
from openlora.engine.mixed_steps import MixedSteps
from openlora.engine.step import StepRow
from openlora.errors import SetupError
from openlora.kernels.triton_invariant_linear import InvariantLinear, SplitScratch
from openlora.models.decoder import Decoder
from openlora.models.dummy import dummy_weights
from openlora.models.weights import weight_shapes
from tests.engine.test_mixed_steps import CONFIG, DEVICE, GREEDY, extras, lora_set

PROMPT = [(7 * index) % 60 + 3 for index in range(18)]
OTHERS = [
    # Beside it in its chunk of rows, ahead of it with pages of their own, behind it without.
    StepRow(7, [9], 2, [7], lora_set((0, 1.0)), GREEDY),
    StepRow(8, [5, 6, 7, 8, 9], 0, [8, 9], lora_set((0, 1.0)), None),
    StepRow(9, [21, 22, 23], 0, [10], lora_set((1, 0.5), (2, -1.0)), GREEDY),
    StepRow(10, [11], 1, [11], LoRASet.EMPTY, GREEDY),
]


class Bench:
    """A model whose steps are deterministic, with an empty cache."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        get = dummy_weights(weight_shapes(CONFIG), torch.float32, DEVICE)
        self.model = Decoder(
            CONFIG,
            lambda name: get(name).mul_(8),
            torch.float32,
            DEVICE,
            make_linear=partial(InvariantLinear, SplitScratch(DEVICE)),
        )
        pages = PageTensors(CONFIG, (3, 3, 3, 3), torch.float32, DEVICE)
        for site in pages.sites:
            site.a.copy_(torch.randn(site.a.shape, generator=generator) * 0.2)
            site.b.copy_(torch.randn(site.b.shape, generator=generator) * 0.2)
        self.cache = KVCache(CONFIG, 12, torch.float32, DEVICE, block_size=4)
        self.cache.tensor.zero_()
        self.steps = MixedSteps(
            self.model,
            pages,
            self.cache,
            num_processors=1,
            max_num_seqs=8,
            max_model_len=64,
            to_device=lambda array: torch.from_numpy(array).to(DEVICE),
            deterministic=True,
        )

    def run(self, own: LoRASet, counts: list[int], others: list[StepRow]) -> list[torch.Tensor]:
        """Logits of the prompt in chunks of ``counts``, in the midst of ``others``."""
        drawn = torch.zeros(8, dtype=torch.int64, device=DEVICE)
        found, start = [], 0
        for count in counts:
            row = StepRow(1, PROMPT[start : start + count], start, [0, 1, 2, 3, 4, 5], own, GREEDY)
            start += count
            rows = sorted([*others[:2], row, *others[2:]], key=lambda row: len(row.token_ids) != 1)
            sampled = [other for other in rows if other.sampling is not None]
            logits = self.steps.logits(rows, {}, drawn)
            assert len(logits) == len(sampled)
            found.append(logits[sampled.index(row)])
        return found


# Whole (more rows than what shares a page's tile), and in parts with the last token as a decode.
CHUNKS = [[18], [5, 12, 1]]


@torch.inference_mode()
@pytest.mark.parametrize(
    # The interpreter takes more than a second a step.
    "kind",
    [
        pytest.param("pages", marks=pytest.mark.long),
        pytest.param("extras", marks=pytest.mark.slow),
    ],
)
def test_logits_do_not_depend_on_chunks_and_neighbours(kind: str) -> None:
    own_extras: AdapterExtras | None = extras() if kind == "extras" else None
    own = {
        "pages": lora_set((2, 0.7), (0, 1.0)),
        "extras": LoRASet(lora_set((0, 1.0)).pages, "extras", own_extras),
    }[kind]
    every = {}
    for counts, others in ((CHUNKS[0], []), *((counts, OTHERS) for counts in CHUNKS)):
        at = 0
        for count, logits in zip(counts, Bench().run(own, counts, others), strict=True):
            at += count
            every.setdefault(at, []).append(logits)
    assert len(every[18]) == 1 + len(CHUNKS)
    for at, found in every.items():
        assert all(torch.equal(found[0], other) for other in found), at


def test_a_cpu_is_refused() -> None:
    with pytest.raises(SetupError, match=r"deterministic is set, but the device is 'cpu'.*GPU"):
        Engine(EngineConfig("1b", load_format="dummy", device="cpu", deterministic=True))
