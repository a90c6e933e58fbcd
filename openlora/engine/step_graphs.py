"""CUDA graphs of steps of few tokens: per size with LoRA or without, captured at the start.

A graph reads everything that changes from step to step out of persistent buffers: tokens,
positions, slots, block tables and the SGMV plan with its work counts. So it serves any mix of
adapters, ranks and weights; only the number of tokens is rounded up, with tokens that write
nothing. Of those with LoRA there are two for decodes, for how the kernels are cut: each serves
every mix, but one is faster where rows share adapters, the other where each has its own.

A capture takes about as long as an eager step, 40 ms for 32 layers. In the middle of serving it
would hold up every stream, and batches that shrink as their requests end need one size after
another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openlora.engine.cuda_ops import CudaOps
from openlora.engine.graph_capture import Graph, GraphDevice, no_collection
from openlora.engine.graph_steps import FIELDS, GraphSteps, LoRAKind
from openlora.engine.sgmv_plan import SGMVPlan
from openlora.engine.step import StepRow
from openlora.engine.step_inputs import StepInputs
from openlora.kernels.triton_sampling import GreedyScratch

logger = logging.getLogger(__name__)

MAX_REREAD = 1 << 18
"""Most tokens · positions that the chunks of a step read here: 512 tokens of a prompt's begin, or
64 at 4,096. With 8 KV heads of 128 in bf16 that is a GiB a layer, most of it from the L2 cache."""
_WARM_LAYERS = 2
_PADDING = np.array(list(FIELDS.values()), np.int32)[:, None]


@dataclass(frozen=True, slots=True)
class _Captured:
    """``ops`` and ``scratch`` only keep what the kernels write; all graphs share the logits."""

    graph: Graph
    ops: CudaOps
    scratch: GreedyScratch
    logits: torch.Tensor
    token_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class GraphStep:
    """A step that was launched; later ones overwrite it.

    Attributes:
        logits: [rows, vocab], ``token_ids``: int64 [rows], the greedy draws.
        at: int32, which of the rows are the sampled tokens'; None: the first ones.
        count: how many these are.
    """

    logits: torch.Tensor
    token_ids: torch.Tensor
    at: torch.Tensor | None
    count: int

    def sampled(self, of: torch.Tensor) -> torch.Tensor:
        """``logits`` or ``token_ids`` of the sampled tokens, in the step's order."""
        return of[: self.count] if self.at is None else of[self.at]


class StepGraphs:
    """Runs steps of few tokens.

    Args:
        steps: what they launch.
        device: where.
    """

    def __init__(self, steps: GraphSteps, device: GraphDevice) -> None:
        self._steps = steps
        self._device = device
        max_blocks = steps.block_tables.shape[1]
        self._dense_tables = steps.plan.new_zeros(steps.max_rows * max_blocks)
        self._uploads = device.upload_ring(steps.fields.numel() + self._dense_tables.numel())
        self._plan_uploads = device.upload_ring(steps.plan.numel())
        self._uploaded_plan: SGMVPlan | None = None
        self._graphs: dict[tuple[int, LoRAKind], _Captured] = {}
        started = time.perf_counter()
        with torch.inference_mode(), no_collection():
            for bucket, kind in steps.sizes():
                self._graphs[bucket, kind] = self._capture(bucket, kind)
        seconds = time.perf_counter() - started
        logger.info("captured %d graphs in %.1f s", len(self._graphs), seconds)

    @property
    def chunk_rows(self) -> int:
        """``chunk_rows`` of the plans this takes."""
        return self._steps.chunk_rows

    @property
    def takes_chunks(self) -> bool:
        """Whether steps may have prefill chunks."""
        return self._steps.max_tokens > self._steps.max_rows

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of tokens, in order, to the next of which a step is rounded up."""
        return self._steps.buckets

    def fits(self, num_rows: int, num_tokens: int, plan: SGMVPlan) -> bool:
        """Whether the persistent buffers hold such a step."""
        steps = self._steps
        return (
            num_rows <= steps.max_rows
            and num_tokens <= steps.max_tokens
            and plan.h_rows <= steps.h_rows
            and steps.layout.fits(plan)
        )

    def run(self, inputs: StepInputs, plan: SGMVPlan) -> GraphStep:
        """Launch one step that ``fits``."""
        num_tokens, count = len(inputs.token_ids), len(inputs.sampled)
        size = self._steps.nearest(num_tokens, _kind(plan))
        captured = self._graphs[size]
        self._upload(inputs, size[0])
        if not plan.is_empty and plan is not self._uploaded_plan:
            self._upload_plan(plan)
        captured.graph.replay()
        is_in_order = count == num_tokens or size[0] > self._steps.max_rows
        at = None if is_in_order else self._steps.field("sampled", count)
        return GraphStep(captured.logits, captured.token_ids, at, count)

    def _capture(self, bucket: int, kind: LoRAKind) -> _Captured:
        steps = self._steps
        ops, scratch = steps.ops(bucket, kind), steps.scratch(bucket)
        # Padding alone: the warm-up loads the matmuls' kernels, which is not allowed in a capture,
        # and writes no KV. All layers have the same; those in Triton are loaded already.
        for field, value in zip(steps.fields, FIELDS.values(), strict=True):
            field.fill_(value)
        if kind != "none":
            steps.plan.zero_()
            self._uploaded_plan = None
        steps.forward(bucket, ops, scratch, _WARM_LAYERS)
        graph, (logits, token_ids) = self._device.capture(
            lambda: steps.forward(bucket, ops, scratch)
        )
        return _Captured(graph, ops, scratch, logits, token_ids)

    def _upload(self, inputs: StepInputs, bucket: int) -> None:
        num_tokens, steps = len(inputs.token_ids), self._steps
        num_rows, width = inputs.block_tables.shape
        num_fields = steps.fields.numel()
        buffer = self._uploads.take()
        host = buffer.numpy()
        fields = host[:num_fields].reshape(steps.fields.shape)
        fields[:, :bucket] = _PADDING
        values = (
            *(inputs.token_ids, inputs.sources, inputs.positions, inputs.slots),
            *(inputs.positions + 1, inputs.owners, inputs.sampled),
        )
        for field, array in zip(fields, values, strict=True):
            field[: len(array)] = array
        size = num_rows * width
        host[num_fields : num_fields + size] = inputs.block_tables.reshape(-1)
        steps.fields.view(-1).copy_(buffer[:num_fields], non_blocking=True)
        dense = self._dense_tables[:size]
        dense.copy_(buffer[num_fields : num_fields + size], non_blocking=True)
        self._uploads.sent(buffer)
        tables = dense.view(num_rows, width)
        if num_tokens > num_rows:
            tables = tables.index_select(0, steps.field("owner", num_tokens))
        steps.block_tables[:num_tokens, :width].copy_(tables)

    def _upload_plan(self, plan: SGMVPlan) -> None:
        steps = self._steps
        buffer = self._plan_uploads.take()
        packed = buffer.view(steps.plan.shape)
        for site, used in enumerate(steps.layout.fill(plan, packed.numpy())):
            steps.plan[site, :used].copy_(packed[site, :used], non_blocking=True)
        self._plan_uploads.sent(buffer)
        self._uploaded_plan = plan


def rereads(rows: Sequence[StepRow]) -> int:
    """Tokens · positions that the chunks among ``rows`` read where each token reads by itself."""
    return sum(
        len(row.token_ids) * (row.start + len(row.token_ids))
        for row in rows
        if len(row.token_ids) > 1
    )


def _kind(plan: SGMVPlan) -> LoRAKind:
    if plan.is_empty:
        return "none"
    return "shared" if plan.rows_share else "distinct"
