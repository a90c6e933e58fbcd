"""Runs steps on a CUDA GPU: decodes through CUDA graphs, steps with prefill eagerly.

``launch`` returns before the GPU has finished. Tokens stay on the device as the next step's input
and reach the host beside it, so that the caller may launch step N+1 before it reads step N.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from openlora.adapters.page_tensors import PageTensors
from openlora.engine.cuda_ops import (
    AttentionBinding,
    CudaOps,
    LoRABinding,
    RotaryBinding,
    prefill_tiles,
    scratch_elements,
)
from openlora.engine.decode_graphs import DecodeGraphs
from openlora.engine.drawn_tokens import DrawnTokens, PendingTokens
from openlora.engine.kv_cache import KVCache
from openlora.engine.page_uploads import PageUploads
from openlora.engine.sampler import is_plain
from openlora.engine.sgmv_plan import PlanLayout, SGMVPlan, build_plan
from openlora.engine.step import StepRow
from openlora.engine.step_inputs import StepInputs, decode_inputs, mixed_inputs, query_tiles
from openlora.kernels.sampling import Samples
from openlora.kernels.triton_attention import DecodeScratch, decode_splits
from openlora.kernels.triton_fused import take_tokens
from openlora.kernels.triton_prefill_attention import prefill_tile_tokens
from openlora.kernels.triton_sgmv import SGMVTables
from openlora.models.decoder import Decoder


class CudaRunner:
    """``Runner`` for CUDA; takes ``PENDING_TOKEN`` in the row of a sequence of the last step.

    Args:
        model: the base model, on a CUDA device.
        pages: LoRA pages that the rows' LoRA sets index.
        kv_cache: blocks that the rows' block tables index.
        uploads: of ``pages``; a step waits for those that it reads.
        max_num_seqs: most rows of a step.
        max_model_len: longest context.
    """

    def __init__(
        self,
        model: Decoder,
        pages: PageTensors,
        kv_cache: KVCache,
        uploads: PageUploads,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._uploads = uploads
        self._pages = [site.layers for site in pages.sites]
        processors = torch.cuda.get_device_properties(model.device).multi_processor_count
        self._tiles = prefill_tiles(self._pages, processors)
        self._drawn = DrawnTokens(max_num_seqs, model.device)
        config = model.config
        self._scratch = DecodeScratch(
            max_num_seqs,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            decode_splits(max_num_seqs, config.num_kv_heads, processors, max_model_len),
            model.device,
        )
        self._graphs = DecodeGraphs(
            model,
            pages,
            kv_cache,
            self._drawn,
            max_rows=max_num_seqs,
            max_model_len=max_model_len,
        )
        # While the same requests decode, their order and plan stay the same from step to step.
        self._decode_key: tuple[object, ...] = ()
        self._decode_order: list[int] = []
        self._decode_plan: SGMVPlan = build_plan([], [], chunk_rows=self._graphs.chunk_rows)

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow]) -> PendingTokens:
        """Queue one forward pass over ``rows``; see ``Runner``."""
        self._uploads.wait_for(rows)
        if all(len(row.token_ids) == 1 for row in rows):
            order, plan = self._decode_order_and_plan(rows)
            if self._graphs.fits(len(rows), plan):
                return self._decode([rows[index] for index in order], order, plan)
        order = sorted(range(len(rows)), key=lambda index: _sort_key(rows[index]))
        return self._mixed([rows[index] for index in order], order)

    def _decode_order_and_plan(self, rows: Sequence[StepRow]) -> tuple[list[int], SGMVPlan]:
        key = tuple((row.sequence_id, row.lora_set) for row in rows)
        if key != self._decode_key:
            order = sorted(range(len(rows)), key=lambda index: _sort_key(rows[index]))
            self._decode_plan = build_plan(
                [rows[index].lora_set for index in order],
                [1] * len(rows),
                chunk_rows=self._graphs.chunk_rows,
            )
            self._decode_key, self._decode_order = key, order
        return self._decode_order, self._decode_plan

    def _decode(self, rows: Sequence[StepRow], order: list[int], plan: SGMVPlan) -> PendingTokens:
        inputs = decode_inputs(rows, self._drawn.at, self._kv_cache.block_size)
        logits, token_ids = self._graphs.run(inputs, plan)
        sampling = [s for row in rows if (s := row.sampling) is not None]
        every = len(sampling) == len(rows)
        if all(is_plain(row.params) for row in sampling):
            tokens = token_ids[: len(rows)] if every else token_ids[self._to_device(inputs.sampled)]
            return self._finish(self._drawn.plain(tokens), rows, order)
        logits = logits[: len(rows)] if every else logits[self._to_device(inputs.sampled)]
        return self._finish(self._drawn.draw(logits, sampling), rows, order)

    def _mixed(self, rows: Sequence[StepRow], order: list[int]) -> PendingTokens:
        inputs = mixed_inputs(rows, self._drawn.at, self._kv_cache.block_size)
        on_device = self._upload(inputs)
        token_ids, sources, sampled = on_device[0], on_device[1], on_device[6]
        ops = self._bind(rows, inputs, on_device)
        tokens = take_tokens(token_ids, sources, self._drawn.tokens)
        hidden = self._model.forward(tokens, ops)
        if not sampled.numel():
            empty = torch.empty(0, dtype=torch.int64, device=hidden.device)
            return self._finish(self._drawn.plain(empty), rows, order)
        logits = self._model.logits(hidden[sampled], ops)
        sampling = [s for row in rows if (s := row.sampling) is not None]
        return self._finish(self._drawn.draw(logits, sampling), rows, order)

    def _finish(self, samples: Samples, rows: Sequence[StepRow], order: list[int]) -> PendingTokens:
        drawn = [i for i, row in enumerate(rows) if row.sampling is not None]
        self._drawn.keep(samples, [rows[i].sequence_id for i in drawn])
        sampling = [s for row in rows if (s := row.sampling) is not None]
        return self._drawn.send(samples, sampling, [order[i] for i in drawn], len(rows))

    def _bind(
        self, rows: Sequence[StepRow], inputs: StepInputs, on_device: Sequence[torch.Tensor]
    ) -> CudaOps:
        _, _, positions, slots, spans, context_lens, _, block_tables, tiles = on_device
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
            ),
            lora=None if plan.is_empty else self._bind_lora(plan),
        )

    def _bind_lora(self, plan: SGMVPlan) -> LoRABinding:
        size = scratch_elements(self._pages, self._tiles, plan.h_rows)
        layout = PlanLayout(plan.num_chunks, plan.num_items)
        packed = np.zeros((len(plan.items), layout.site_ints), np.int32)
        layout.fill(plan, packed)
        return LoRABinding(
            plan=SGMVTables(
                self._to_device(packed),
                layout.items_at,
                layout.max_chunks,
                layout.max_items,
                usual_chunks=layout.max_chunks,
                usual_items=layout.max_items,
            ),
            pages=self._pages,
            h=torch.empty(size, device=self._model.device),
            h_rows=plan.h_rows,
            tiles=self._tiles,
        )

    def _upload(self, inputs: StepInputs) -> list[torch.Tensor]:
        """All arrays of ``inputs`` and the query tiles, on the device in one copy."""
        config = self._model.config
        tile_tokens = prefill_tile_tokens(config.num_heads, config.num_kv_heads)
        arrays = [
            inputs.token_ids,
            inputs.sources,
            inputs.positions,
            inputs.slots,
            inputs.spans,
            inputs.context_lens,
            inputs.sampled,
            inputs.block_tables,
            query_tiles(inputs.spans, _num_decodes(inputs), tile_tokens),
        ]
        packed = self._to_device(np.concatenate([array.reshape(-1) for array in arrays]))
        parts = torch.split(packed, [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        # From pinned memory, for a copy from plain memory would wait for the steps under way.
        host = torch.from_numpy(array).pin_memory()
        return host.to(self._model.device, non_blocking=True)


def _num_decodes(inputs: StepInputs) -> int:
    """Leading rows of one token: the caller sorts them first."""
    return int((inputs.spans[:, 1] == 1).sum())


def _sort_key(row: StepRow) -> tuple[bool, bool, tuple[tuple[tuple[int, float], ...], ...]]:
    """Decodes first; within them and within the prefills, equal LoRA sets together, base last."""
    return (len(row.token_ids) != 1, row.lora_set.is_empty, row.lora_set.pages)
