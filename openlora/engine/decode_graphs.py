"""CUDA graphs of the decode step: per batch bucket with LoRA or without, captured at the start.

A graph reads everything that changes from step to step out of persistent buffers: tokens,
positions, slots, block tables and the SGMV plan with its work counts. So it serves any mix of
adapters, ranks and weights; only the number of rows is rounded up, with rows that write nothing.
Of those with LoRA there are two, for how the kernels are cut: each serves every mix, but one is
faster where rows share adapters, the other where each has its own.

A capture takes about as long as an eager step, 40 ms for 32 layers. In the middle of serving it
would hold up every stream, and batches that shrink as their requests end need one size after
another.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from openlora.adapters.page_tensors import PageTensors
from openlora.engine.attention_backends import AttentionChoice
from openlora.engine.attention_binding import AttentionBinding, attention_scratch
from openlora.engine.cuda_ops import (
    CudaOps,
    LoRABinding,
    RotaryBinding,
    decode_tiles,
    scratch_elements,
)
from openlora.engine.drawn_tokens import DrawnTokens, PinnedRing
from openlora.engine.kv_cache import KVCache
from openlora.engine.sgmv_plan import PlanLayout, SGMVPlan
from openlora.engine.step_inputs import StepInputs
from openlora.kernels.triton_sampling import GreedyScratch, greedy, take_tokens
from openlora.kernels.triton_sgmv import SGMVTables
from openlora.models.decoder import Decoder

logger = logging.getLogger(__name__)

PAGES_PER_ROW = 32
"""Room in a graph's LoRA buffers: 8 adapters of rank 64 for every row."""
USUAL_PAGES_PER_ROW = 4
"""Pages a row that the launches have programs for: one adapter of rank 64."""
LoRAKind = Literal["none", "shared", "distinct"]
_KINDS: tuple[LoRAKind, ...] = ("none", "distinct", "shared")
_WARM_LAYERS = 2
_FIELDS = 5
"""Ints a row takes in the upload: token, source, position, slot, context length."""


def buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that graphs are captured for: rounding up costs at most a third."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    return (*(size for size in sizes if size < max_rows), max_rows)


@dataclass(frozen=True, slots=True)
class _Graph:
    """``ops`` and ``scratch`` only keep what the kernels write; all graphs share the logits."""

    graph: torch.cuda.CUDAGraph
    ops: CudaOps
    scratch: GreedyScratch
    logits: torch.Tensor
    token_ids: torch.Tensor


class DecodeGraphs:
    """Runs steps of one token per row.

    Args:
        model, pages, kv_cache: what the step computes with.
        drawn: the tokens that feed the next step.
        max_rows: most rows of a step.
        max_model_len: longest context.
        attention: what computes it; a library has been called before (``warm_attention``).
        deterministic: see ``MixedSteps``; the kernels with LoRA are then cut in one way.
    """

    def __init__(
        self,
        model: Decoder,
        pages: PageTensors,
        kv_cache: KVCache,
        drawn: DrawnTokens,
        *,
        max_rows: int,
        max_model_len: int,
        attention: AttentionChoice,
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._attention = attention
        self._kv_layers = kv_cache.layers
        self._drawn = drawn
        self._max_rows = max_rows
        self._buckets = buckets(max_rows)
        device = model.device
        max_blocks = -(-max_model_len // kv_cache.block_size)
        self._max_model_len = max_model_len
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._pages = [site.layers for site in pages.sites]
        self._deterministic = deterministic
        cut = partial(decode_tiles, self._pages, self._processors, deterministic=deterministic)
        self._tiles = {share: cut(rows_share=share) for share in (False, True)}
        self._h_rows = max_rows * PAGES_PER_ROW

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._fields = zeros(_FIELDS, max_rows)
        self._dense_tables = zeros(max_rows * max_blocks)
        self._block_tables = zeros(max_rows, max_blocks)
        self._layout = PlanLayout(max_rows, max_rows * PAGES_PER_ROW)
        self._plan = zeros(4, self._layout.site_ints)
        elements = scratch_elements(self._pages, self._tiles[True], self._h_rows)
        self._h = torch.empty(elements, device=device)
        self._uploads = PinnedRing(_FIELDS * max_rows + max_rows * max_blocks)
        self._plan_uploads = PinnedRing(self._plan.numel())
        self._uploaded_plan: SGMVPlan | None = None
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        vocab = model.config.vocab_size
        self._logits = torch.empty(max_rows, vocab, dtype=model.dtype, device=device)
        self._graphs: dict[tuple[int, LoRAKind], _Graph] = {}
        with torch.inference_mode():
            kinds = _KINDS if any(len(site.a) for site in pages.sites) else _KINDS[:1]
            self._capture_all(kinds[:2] if deterministic else kinds)

    @property
    def chunk_rows(self) -> int:
        """``chunk_rows`` of the plans this takes."""
        return self._tiles[True][0].chunk_rows

    def fits(self, num_rows: int, plan: SGMVPlan) -> bool:
        """Whether the persistent buffers hold such a step."""
        return (
            num_rows <= self._max_rows and plan.h_rows <= self._h_rows and self._layout.fits(plan)
        )

    def run(self, inputs: StepInputs, plan: SGMVPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch one step.

        Returns:
            Logits [bucket, vocab] and greedy tokens [bucket], rows in order, padding behind; both
            are overwritten by later steps.
        """
        num_rows = len(inputs.token_ids)
        bucket = next(size for size in self._buckets if size >= num_rows)
        kind = _kind(plan)
        graph = self._graphs[bucket, "distinct" if kind != "none" and self._deterministic else kind]
        self._upload(inputs, bucket)
        if not plan.is_empty and plan is not self._uploaded_plan:
            self._upload_plan(plan)
        graph.graph.replay()
        return graph.logits, graph.token_ids

    def _capture_all(self, kinds: Sequence[LoRAKind]) -> None:
        started = time.perf_counter()
        # What the collector finds in the middle of a capture, graphs of an engine before this one
        # say, could end it: freeing them is not allowed then.
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            # The largest first: all others find room in what it has used.
            for bucket in reversed(self._buckets):
                for kind in kinds:
                    self._graphs[bucket, kind] = self._capture(bucket, kind)
        finally:
            if was_enabled:
                gc.enable()
        seconds = time.perf_counter() - started
        logger.info("captured %d decode graphs in %.1f s", len(self._graphs), seconds)

    def _capture(self, bucket: int, kind: LoRAKind) -> _Graph:
        ops = self._ops(bucket, kind)
        scratch = GreedyScratch(bucket, self._processors, self._model.device)
        # Rows of padding alone: the warm-up loads the matmuls' kernels, which is not allowed in a
        # capture, and writes no KV. All layers have the same; those in Triton are loaded already.
        self._fields.zero_()
        self._fields[1].fill_(-1)
        self._fields[3].fill_(-1)
        if kind != "none":
            self._plan.zero_()
            self._uploaded_plan = None
        self._forward(bucket, ops, scratch, _WARM_LAYERS)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which gives all cached memory back to the driver each time.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads load adapters meanwhile; what they allocate is no part of the capture.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                logits, token_ids = self._forward(bucket, ops, scratch)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Graph(graph, ops, scratch, logits, token_ids)

    def _forward(
        self,
        bucket: int,
        ops: CudaOps,
        scratch: GreedyScratch,
        num_layers: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = take_tokens(self._fields[0, :bucket], self._fields[1, :bucket], self._drawn.tokens)
        hidden = self._model.forward(tokens, ops, num_layers)
        logits = self._model.logits(hidden, ops)
        return logits, greedy(logits, scratch)

    def _ops(self, bucket: int, kind: LoRAKind) -> CudaOps:
        config = self._model.config
        scratch = attention_scratch(
            config,
            bucket,
            num_processors=self._processors,
            max_model_len=self._max_model_len,
            device=self._model.device,
            deterministic=self._deterministic,
        )
        lora = LoRABinding(
            plan=self._tables(bucket),
            pages=self._pages,
            h=self._h,
            h_rows=self._h_rows,
            tiles=self._tiles[kind == "shared"],
        )
        return CudaOps(
            config=config,
            positions=self._fields[2, :bucket],
            slots=self._fields[3, :bucket],
            rotary=RotaryBinding.of(self._model),
            kv_layers=self._kv_layers,
            attention_binding=AttentionBinding.of_decodes(
                num_decodes=bucket,
                block_tables=self._block_tables,
                context_lens=self._fields[4, :bucket],
                scratch=scratch,
                choice=self._attention,
            ),
            lora=None if kind == "none" else lora,
            logits=self._logits,
        )

    def _upload(self, inputs: StepInputs, bucket: int) -> None:
        num_rows, width = inputs.block_tables.shape
        num_fields = _FIELDS * self._max_rows
        buffer = self._uploads.take()
        host = buffer.numpy()
        fields = host[:num_fields].reshape(_FIELDS, self._max_rows)
        fields[:, :bucket] = ((0,), (-1,), (0,), (-1,), (0,))
        fields[0, :num_rows] = inputs.token_ids
        fields[1, :num_rows] = inputs.sources
        fields[2, :num_rows] = inputs.positions
        fields[3, :num_rows] = inputs.slots
        fields[4, :num_rows] = inputs.context_lens
        size = num_rows * width
        host[num_fields : num_fields + size] = inputs.block_tables.reshape(-1)
        self._fields.view(-1).copy_(buffer[:num_fields], non_blocking=True)
        dense = self._dense_tables[:size]
        dense.copy_(buffer[num_fields : num_fields + size], non_blocking=True)
        self._uploads.sent(buffer)
        self._block_tables[:num_rows, :width].copy_(dense.view(num_rows, width))

    def _tables(self, bucket: int) -> SGMVTables:
        layout = self._layout
        return SGMVTables(
            self._plan,
            layout.items_at,
            layout.max_chunks,
            layout.max_items,
            usual_chunks=bucket,
            usual_items=bucket * USUAL_PAGES_PER_ROW,
        )

    def _upload_plan(self, plan: SGMVPlan) -> None:
        buffer = self._plan_uploads.take()
        packed = buffer.view(self._plan.shape)
        for site, used in enumerate(self._layout.fill(plan, packed.numpy())):
            self._plan[site, :used].copy_(packed[site, :used], non_blocking=True)
        self._plan_uploads.sent(buffer)
        self._uploaded_plan = plan


def _kind(plan: SGMVPlan) -> LoRAKind:
    if plan.is_empty:
        return "none"
    return "shared" if plan.rows_share else "distinct"
