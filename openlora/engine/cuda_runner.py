"""Runs steps on a CUDA GPU: those of few tokens through CUDA graphs, the others eagerly.

``launch`` returns before the GPU has finished. Tokens stay on the device as the next step's input
and reach the host beside it, so that the caller may launch step N+1 before it reads step N.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from openlora.adapters.page_tensors import PageTensors
from openlora.engine.attention_backends import AttentionChoice
from openlora.engine.attention_warm_up import warm_attention
from openlora.engine.drawn_tokens import DrawnTokens, PendingTokens
from openlora.engine.graph_capture import CudaGraphDevice
from openlora.engine.graph_steps import GraphSteps
from openlora.engine.kv_cache import KVCache
from openlora.engine.mixed_steps import MixedSteps
from openlora.engine.page_uploads import PageUploads
from openlora.engine.runner import batch_order
from openlora.engine.sampler import is_plain
from openlora.engine.sgmv_plan import SGMVPlan, build_plan
from openlora.engine.step import StepRow
from openlora.engine.step_graphs import MAX_REREAD, StepGraphs, rereads
from openlora.engine.step_inputs import StepInputs, decode_inputs, mixed_inputs
from openlora.kernels.sampling import Samples
from openlora.models.decoder import Decoder


class CudaRunner:
    """``Runner`` for CUDA; takes ``PENDING_TOKEN`` in the row of a sequence of the last step.

    Args:
        model: the base model, on a CUDA device.
        pages: LoRA pages that the rows' LoRA sets index.
        kv_cache: blocks that the rows' block tables index.
        uploads: of ``pages``; a step waits for those that it reads.
        max_num_seqs: most rows of a step.
        max_graph_tokens: most tokens of a step with chunks that runs as a graph; 0: none does.
        max_model_len: longest context.
        attention: what computes it.
        deterministic: what a row gets does not depend on the others; its linears are the model's.
    """

    def __init__(
        self,
        model: Decoder,
        pages: PageTensors,
        kv_cache: KVCache,
        uploads: PageUploads,
        *,
        max_num_seqs: int,
        max_graph_tokens: int = 0,
        max_model_len: int,
        attention: AttentionChoice,
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._uploads = uploads
        device = CudaGraphDevice(model.device)
        warm_attention(
            attention,
            model.config,
            kv_cache.layers[0],
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        self._drawn = DrawnTokens(max_num_seqs, model.device, fixed_order=deterministic)
        self._mixed_steps = MixedSteps(
            model,
            pages,
            kv_cache,
            num_processors=device.num_processors,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            to_device=self._to_device,
            attention=attention,
            deterministic=deterministic,
        )
        # Chunks in graphs are computed as decodes are, by Triton: a library called by name, or
        # one whose kernels were warmed for decodes of fewer rows, is not to be bypassed.
        takes_chunks = attention.decode is None and (
            attention.prefill is None or attention.library_from > MAX_REREAD
        )
        steps = GraphSteps(
            model,
            pages,
            kv_cache,
            self._drawn.tokens,
            num_processors=device.num_processors,
            max_rows=max_num_seqs,
            max_tokens=max_graph_tokens if takes_chunks else 0,
            max_model_len=max_model_len,
            attention=attention,
            deterministic=deterministic,
        )
        self._graphs = StepGraphs(steps, device)
        # While the same requests decode, their order and plan stay the same from step to step.
        self._decode_key: tuple[object, ...] = ()
        self._decode_order: list[int] = []
        self._decode_plan: SGMVPlan = build_plan([], [], chunk_rows=self._graphs.chunk_rows)

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """As in ``EngineParts``."""
        return self._graphs.sizes if self._graphs.takes_chunks else ()

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow]) -> PendingTokens:
        """Queue one forward pass over ``rows``; see ``Runner``."""
        self._uploads.wait_for(rows)
        # Extras are patched in by operations on single rows, which no graph holds.
        if any(row.lora_set.extras is not None for row in rows):
            return self._eager(rows)
        graphs, num_tokens = self._graphs, sum(len(row.token_ids) for row in rows)
        if num_tokens == len(rows):
            order, plan = self._decode_order_and_plan(rows)
        elif graphs.takes_chunks and rereads(rows) <= MAX_REREAD:
            order = batch_order(rows)
            plan = self._plan(rows, order)
        else:
            return self._eager(rows)
        if not graphs.fits(len(rows), num_tokens, plan):
            return self._eager(rows)
        ordered = [rows[index] for index in order]
        to_inputs = decode_inputs if num_tokens == len(rows) else mixed_inputs
        inputs = to_inputs(ordered, self._drawn.at, self._kv_cache.block_size)
        return self._replay(ordered, order, inputs, plan)

    def _decode_order_and_plan(self, rows: Sequence[StepRow]) -> tuple[list[int], SGMVPlan]:
        key = tuple((row.sequence_id, row.lora_set) for row in rows)
        if key != self._decode_key:
            order = batch_order(rows)
            self._decode_plan = self._plan(rows, order)
            self._decode_key, self._decode_order = key, order
        return self._decode_order, self._decode_plan

    def _plan(self, rows: Sequence[StepRow], order: Sequence[int]) -> SGMVPlan:
        return build_plan(
            [rows[index].lora_set for index in order],
            [len(rows[index].token_ids) for index in order],
            chunk_rows=self._graphs.chunk_rows,
        )

    def _replay(
        self, rows: Sequence[StepRow], order: list[int], inputs: StepInputs, plan: SGMVPlan
    ) -> PendingTokens:
        step = self._graphs.run(inputs, plan)
        sampling = [s for row in rows if (s := row.sampling) is not None]
        if all(is_plain(row.params) for row in sampling):
            return self._finish(self._drawn.plain(step.sampled(step.token_ids)), rows, order)
        return self._finish(self._drawn.draw(step.sampled(step.logits), sampling), rows, order)

    def _eager(self, unordered: Sequence[StepRow]) -> PendingTokens:
        order = batch_order(unordered)
        rows = [unordered[index] for index in order]
        logits = self._mixed_steps.logits(rows, self._drawn.at, self._drawn.tokens)
        sampling = [s for row in rows if (s := row.sampling) is not None]
        if not sampling:
            none = torch.empty(0, dtype=torch.int64, device=logits.device)
            return self._finish(self._drawn.plain(none), rows, order)
        return self._finish(self._drawn.draw(logits, sampling), rows, order)

    def _finish(self, samples: Samples, rows: Sequence[StepRow], order: list[int]) -> PendingTokens:
        drawn = [i for i, row in enumerate(rows) if row.sampling is not None]
        self._drawn.keep(samples, [rows[i].sequence_id for i in drawn])
        sampling = [s for row in rows if (s := row.sampling) is not None]
        return self._drawn.send(samples, sampling, [order[i] for i in drawn], len(rows))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        # From pinned memory, for a copy from plain memory would wait for the steps under way.
        host = torch.from_numpy(array).pin_memory()
        return host.to(self._model.device, non_blocking=True)
