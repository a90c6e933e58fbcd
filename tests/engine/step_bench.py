"""A small model whose steps are computed twice: in the way under test, and in torch."""

from __future__ import annotations

import torch

from openlora.adapters.lora_set import LoRASet
from openlora.adapters.page_tensors import PageTensors
from openlora.engine.extra_ops import with_extras
from openlora.engine.kv_cache import KVCache
from openlora.engine.runner import ModelRunner
from openlora.engine.step import RowSampling, StepRow
from openlora.kernels.linear import Linear
from openlora.models.config import ModelConfig
from openlora.models.decoder import Decoder
from openlora.models.dummy import dummy_weights
from openlora.models.weights import weight_shapes
from openlora.sampling_params import SamplingParams

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=48,
    intermediate_size=40,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_model_len=64,
    tie_word_embeddings=True,
    eos_token_ids=(2,),
    dtype="float32",
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY = RowSampling(SamplingParams(temperature=0), 0, 0, (), ())


def lora_set(*pages: tuple[int, float]) -> LoRASet:
    # The MLP has the first page alone, as an adapter of mixed ranks would.
    return LoRASet((pages, pages, pages[:1], pages[:1]), str(pages))


# Without a sample, as chunks of longer prompts are.
PREFILL = [
    StepRow(1, [5, 6, 7, 8, 9], 0, [3, 0], lora_set((0, 1.0)), None),
    StepRow(3, [21, 22, 23], 0, [2], lora_set((1, 0.5), (2, -1.0)), None),
    StepRow(2, [11, 12], 0, [1], LoRASet.EMPTY, GREEDY),
]
MIXED = [
    StepRow(1, [10], 5, [3, 0], lora_set((0, 1.0)), GREEDY),
    StepRow(3, [24], 3, [2], lora_set((1, 0.5), (2, -1.0)), GREEDY),
    StepRow(2, [13, 14, 15], 2, [1, 4], LoRASet.EMPTY, GREEDY),
]


class PlainLinear(Linear):
    """As on a GPU: the weight is kept as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias, self.is_packed = weight, bias, False
        self.out_features, self.in_features = weight.shape


class StepBench:
    """A model with two caches: ``cache`` for the way under test, ``torch_cache`` for torch's."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        get = dummy_weights(weight_shapes(CONFIG), torch.float32, DEVICE)
        self.model = Decoder(
            CONFIG, lambda name: get(name).mul_(8), torch.float32, DEVICE, make_linear=PlainLinear
        )
        self.pages = PageTensors(CONFIG, (3, 3, 3, 3), torch.float32, DEVICE)
        for site in self.pages.sites:
            site.a.copy_(torch.randn(site.a.shape, generator=generator) * 0.2)
            site.b.copy_(torch.randn(site.b.shape, generator=generator) * 0.2)
        self.cache, self.torch_cache = (
            KVCache(CONFIG, 6, torch.float32, DEVICE, block_size=4) for _ in range(2)
        )
        self.reference = ModelRunner(self.model, self.pages, self.torch_cache)

    def expected(self, rows: list[StepRow]) -> torch.Tensor:
        ops = self.reference._bind(rows)
        token_ids = torch.tensor([t for row in rows for t in row.token_ids], device=DEVICE)
        own = [(len(row.token_ids), row.lora_set.extras) for row in rows]
        hidden = self.model.forward(token_ids, with_extras(ops, self.model, own))
        ends = torch.tensor([len(row.token_ids) for row in rows]).cumsum(0) - 1
        sampled = [index for index, row in enumerate(rows) if row.sampling is not None]
        heads = with_extras(ops, self.model, [(1, own[index][1]) for index in sampled])
        return self.model.logits(hidden[ends[sampled]], heads)

    def assert_same(self, logits: torch.Tensor, rows: list[StepRow]) -> None:
        """``rows``' logits, and all that was written so far, are as torch's."""
        torch.testing.assert_close(logits, self.expected(rows), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(self.cache.tensor, self.torch_cache.tensor, rtol=1e-3, atol=1e-4)
