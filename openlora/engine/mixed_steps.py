"""Steps with prefill chunks on the Triton kernels: any mix of rows, bound anew for each step.

What travels to the device is laid out so that a kernel sees one alignment of each argument
whatever the step's sizes are: Triton compiles a kernel anew for another one, which would stall
the engine for a second in the middle of serving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from openlora.adapters.page_tensors import PageTensors
from openlora.engine.attention_backends import TRITON_ATTENTION, AttentionChoice
from openlora.engine.attention_binding import AttentionBinding, attention_scratch, tile_tokens
from openlora.engine.cuda_ops import (
    CudaOps,
    LoRABinding,
    RotaryBinding,
    decode_tiles,
    prefill_tiles,
    scratch_elements,
)
from openlora.engine.device_extras import DeviceExtras
from openlora.engine.extra_math import TORCH_MATH
from openlora.engine.extra_ops import with_extras
from openlora.engine.invariant_extra_math import InvariantExtraMath
from openlora.engine.kv_cache import KVCache
from openlora.engine.residency import EXTRAS_BYTES
from openlora.engine.sgmv_plan import PlanLayout, SGMVPlan, build_plan
from openlora.engine.step import StepRow
from openlora.engine.step_inputs import Ints, StepInputs, mixed_inputs, query_tiles
from openlora.kernels.flash_attention import Chunks
from openlora.kernels.triton_sampling import take_tokens
from openlora.kernels.triton_sgmv import SGMVTables
from openlora.models.decoder import Decoder

_ALIGNED = 16
"""Ints to which sizes are rounded: Triton tells multiples of 16 from other numbers, and addresses
that are multiples of 16 bytes."""


class MixedSteps:
    """Computes steps of any rows, those of adapters with extras included.

    Tensors may be of any device that ``to_device`` moves to.

    Args:
        model, pages, kv_cache: what the steps compute with.
        num_processors: of the device.
        max_num_seqs: most rows of a step.
        max_model_len: longest context.
        to_device: makes a tensor of an array, on the model's device, without waiting.
        attention: what computes it.
        deterministic: rows do not depend on each other; so must the model's linears do.
    """

    def __init__(
        self,
        model: Decoder,
        pages: PageTensors,
        kv_cache: KVCache,
        *,
        num_processors: int,
        max_num_seqs: int,
        max_model_len: int,
        to_device: Callable[[Ints], torch.Tensor],
        attention: AttentionChoice = TRITON_ATTENTION,
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._attention = attention
        self._kv_cache = kv_cache
        self._pages = [site.layers for site in pages.sites]
        self._tiles = (
            decode_tiles(self._pages, num_processors, rows_share=True, deterministic=True)
            if deterministic
            else prefill_tiles(self._pages, num_processors)
        )
        self._to_device = to_device
        self._extras = DeviceExtras(model.device, EXTRAS_BYTES)
        self._math = InvariantExtraMath(model.device) if deterministic else TORCH_MATH
        self._tile_tokens = tile_tokens(model.config, deterministic=deterministic)
        self._scratch = attention_scratch(
            model.config,
            max_num_seqs,
            num_processors=num_processors,
            max_model_len=max_model_len,
            device=model.device,
            deterministic=deterministic,
        )

    def logits(
        self, rows: Sequence[StepRow], drawn_at: Mapping[int, int], drawn: torch.Tensor
    ) -> torch.Tensor:
        """Compute KV of every row's tokens, and logits [sampled rows, vocab] in their order.

        Args:
            rows: those of one token first, equal LoRA sets together.
            drawn_at: sequence ID → place in ``drawn``, for pending tokens.
            drawn: int64, the tokens that the last step drew.
        """
        inputs = mixed_inputs(rows, drawn_at, self._kv_cache.block_size)
        on_device = self._upload(inputs)
        token_ids, sources, sampled = on_device[0], on_device[1], on_device[6]
        ops = self._bind(rows, inputs, on_device)
        extras = [(len(row.token_ids), self._extras.of(row.lora_set.extras)) for row in rows]
        tokens = take_tokens(token_ids, sources, drawn)
        hidden = self._model.forward(tokens, with_extras(ops, self._model, extras, self._math))
        if not sampled.numel():
            return hidden.new_empty(0, self._model.config.vocab_size)
        heads = [
            (1, own) for row, (_, own) in zip(rows, extras, strict=True) if row.sampling is not None
        ]
        return self._model.logits(hidden[sampled], with_extras(ops, self._model, heads, self._math))

    def _bind(
        self, rows: Sequence[StepRow], inputs: StepInputs, on_device: Sequence[torch.Tensor]
    ) -> CudaOps:
        _, _, positions, slots, spans, context_lens, _, block_tables, tiles = on_device[:9]
        plan = build_plan(
            [row.lora_set for row in rows],
            [len(row.token_ids) for row in rows],
            chunk_rows=self._tiles[0].chunk_rows,
        )
        return CudaOps(
            config=self._model.config,
            positions=positions,
            slots=slots,
            rotary=RotaryBinding.of(self._model),
            kv_layers=self._kv_cache.layers,
            attention_binding=AttentionBinding(
                num_decodes=_num_decodes(inputs),
                block_tables=block_tables,
                context_lens=context_lens,
                scratch=self._scratch,
                spans=spans,
                tiles=tiles,
                chunks=_chunks(inputs, block_tables, context_lens, *on_device[9:]),
                choice=self._attention,
            ),
            lora=None if plan.is_empty else self._bind_lora(plan),
        )

    def _bind_lora(self, plan: SGMVPlan) -> LoRABinding:
        size = scratch_elements(self._pages, self._tiles, plan.h_rows)
        layout = PlanLayout(_rounded(plan.num_chunks), _rounded(plan.num_items))
        packed = np.zeros((len(plan.items), layout.site_ints), np.int32)
        layout.fill(plan, packed)
        return LoRABinding(
            plan=SGMVTables(
                self._to_device(packed),
                layout.items_at,
                layout.max_chunks,
                layout.max_items,
                usual_chunks=plan.num_chunks,
                usual_items=plan.num_items,
            ),
            pages=self._pages,
            h=torch.empty(size, device=self._model.device),
            h_rows=plan.h_rows,
            tiles=self._tiles,
        )

    def _upload(self, inputs: StepInputs) -> list[torch.Tensor]:
        """All arrays of ``inputs`` and the query tiles, on the device in one copy."""
        width = inputs.block_tables.shape[1]
        arrays = [
            inputs.token_ids,
            inputs.sources,
            inputs.positions,
            inputs.slots,
            inputs.spans,
            inputs.context_lens,
            inputs.sampled,
            np.pad(inputs.block_tables, ((0, 0), (0, _rounded(width) - width))),
            query_tiles(inputs.spans, _num_decodes(inputs), self._tile_tokens),
        ]
        if self._takes_library(inputs):
            arrays += [
                np.append(inputs.spans[:, 0], inputs.spans[-1, :2].sum()),
                np.append(0, inputs.context_lens.cumsum()),
            ]
        sizes = [_rounded(array.size) for array in arrays]
        host = np.zeros(sum(sizes), np.int32)
        starts = np.cumsum([0, *sizes]).tolist()
        for start, array in zip(starts, arrays, strict=False):
            host[start : start + array.size] = array.reshape(-1)
        parts = torch.split(self._to_device(host), sizes)
        return [
            part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)
        ]

    def _takes_library(self, inputs: StepInputs) -> bool:
        """Whether a library computes the rows behind the decodes."""
        first = _num_decodes(inputs)
        if self._attention.prefill is None or first == len(inputs.spans):
            return False
        tokens, contexts = inputs.spans[first:, 1], inputs.context_lens[first:]
        return int(tokens.astype(np.int64) @ contexts) >= self._attention.library_from


def _rounded(count: int) -> int:
    return math.ceil(count / _ALIGNED) * _ALIGNED


def _num_decodes(inputs: StepInputs) -> int:
    """Leading rows of one token: the caller sorts them first."""
    return int((inputs.spans[:, 1] == 1).sum())


def _chunks(
    inputs: StepInputs,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor | None = None,
    context_starts: torch.Tensor | None = None,
) -> Chunks | None:
    """The rows behind the decodes, for a library; None: it gets none."""
    if query_starts is None or context_starts is None:
        return None
    first = _num_decodes(inputs)
    return Chunks(
        query_starts[first:],
        context_lens[first:],
        context_starts[first:],
        block_tables[first:],
        int(inputs.spans[:, 1].max()),
    )
