"""A whole step on the Triton kernels, in the interpreter, against the same step in torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from openlora.adapters.lora_set import LoRASet
from openlora.adapters.page_tensors import PageTensors
from openlora.engine.cuda_ops import (
    AttentionBinding,
    CudaOps,
    LoRABinding,
    RotaryBinding,
    decode_tiles,
    scratch_elements,
)
from openlora.engine.kv_cache import KVCache
from openlora.engine.runner import ModelRunner
from openlora.engine.sgmv_plan import PlanLayout, build_plan
from openlora.engine.step import StepRow
from openlora.engine.step_inputs import StepInputs, mixed_inputs, query_tiles
from openlora.kernels.triton_attention import DecodeScratch
from openlora.kernels.triton_prefill_attention import prefill_tile_tokens
from openlora.kernels.triton_sgmv import SGMVTables
from openlora.models.config import ModelConfig
from openlora.models.decoder import Decoder
from openlora.models.dummy import dummy_weights
from openlora.models.weights import weight_shapes

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


def lora_set(*pages: tuple[int, float]) -> LoRASet:
    # The MLP has the first page alone, as an adapter of mixed ranks would.
    return LoRASet((pages, pages, pages[:1], pages[:1]), str(pages))


PREFILL = [
    StepRow(1, [5, 6, 7, 8, 9], 0, [3, 0], lora_set((0, 1.0)), None),
    StepRow(2, [11, 12], 0, [1], LoRASet.EMPTY, None),
    StepRow(3, [21, 22, 23], 0, [2], lora_set((1, 0.5), (2, -1.0)), None),
]
MIXED = [
    StepRow(1, [10], 5, [3, 0], lora_set((0, 1.0)), None),
    StepRow(3, [24], 3, [2], lora_set((1, 0.5), (2, -1.0)), None),
    StepRow(2, [13, 14, 15], 2, [1, 4], LoRASet.EMPTY, None),
]


def bind(
    model: Decoder, pages: PageTensors, cache: KVCache, rows: list[StepRow]
) -> tuple[CudaOps, StepInputs]:
    """What the CUDA runner binds for a step with prefill, on any device."""

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(DEVICE)

    inputs = mixed_inputs(rows, {}, cache.block_size)
    num_decodes = int((inputs.spans[:, 1] == 1).sum())
    site_pages = [site.layers for site in pages.sites]
    tiles = decode_tiles(site_pages, num_processors=1, rows_share=True)
    plan = build_plan(
        [row.lora_set for row in rows],
        [len(row.token_ids) for row in rows],
        chunk_rows=tiles[0].chunk_rows,
    )
    layout = PlanLayout(plan.num_chunks, plan.num_items)
    packed = np.zeros((4, layout.site_ints), np.int32)
    layout.fill(plan, packed)
    most = (layout.max_chunks, layout.max_items)
    lora = LoRABinding(
        plan=SGMVTables(on_device(packed), layout.items_at, *most, *most),
        pages=site_pages,
        h=torch.empty(scratch_elements(site_pages, tiles, plan.h_rows), device=DEVICE),
        h_rows=plan.h_rows,
        tiles=tiles,
    )
    attention = AttentionBinding(
        num_decodes=num_decodes,
        block_tables=on_device(inputs.block_tables),
        context_lens=on_device(inputs.context_lens),
        scratch=DecodeScratch(len(rows), CONFIG.num_heads, CONFIG.num_kv_heads, 8, 2, DEVICE),
        spans=on_device(inputs.spans),
        tiles=on_device(query_tiles(inputs.spans, num_decodes, prefill_tile_tokens(6, 2))),
    )
    ops = CudaOps(
        config=CONFIG,
        positions=on_device(inputs.positions),
        slots=on_device(inputs.slots),
        rotary=RotaryBinding.of(model),
        kv_layers=cache.layers,
        attention_binding=attention,
        lora=lora,
    )
    return ops, inputs


@torch.inference_mode()
def test_prefill_then_a_mixed_step() -> None:
    generator = torch.Generator().manual_seed(3)
    get = dummy_weights(weight_shapes(CONFIG), torch.float32, DEVICE)
    model = Decoder(CONFIG, lambda name: get(name).mul_(8), torch.float32, DEVICE)
    pages = PageTensors(CONFIG, (3, 3, 3, 3), torch.float32, DEVICE)
    for site in pages.sites:
        site.a.copy_(torch.randn(site.a.shape, generator=generator) * 0.2)
        site.b.copy_(torch.randn(site.b.shape, generator=generator) * 0.2)
    triton_cache, torch_cache = (
        KVCache(CONFIG, 6, torch.float32, DEVICE, block_size=4) for _ in range(2)
    )
    reference = ModelRunner(model, pages, torch_cache)
    for rows in (PREFILL, MIXED):
        ops, inputs = bind(model, pages, triton_cache, rows)
        token_ids = torch.from_numpy(inputs.token_ids).long().to(DEVICE)
        hidden = model.forward(token_ids, ops)
        expected = model.forward(token_ids, reference._bind(rows))
        torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(triton_cache.tensor, torch_cache.tensor, rtol=1e-3, atol=1e-4)
    base = model.forward(token_ids, replace(ops, lora=None))
    assert not torch.allclose(base[:1], hidden[:1], rtol=1e-2)
