"""One forward pass by the native CPU kernels.

A step of few tokens is a list of operations recorded once, which one call runs: between its
kernels no Python runs and no thread sleeps. Each token of a prefill chunk is a row as a decode is,
which sees those before it since all keys are written before any is read. Any other step runs the
same decoder operation by operation, and torch attends for the chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openlora.adapters.page_tensors import PageTensors
from openlora.engine.extra_ops import with_extras
from openlora.engine.kv_cache import KVCache
from openlora.engine.native_inputs import StepBinder
from openlora.engine.native_ops import Chunks, NativeOps, NativeParts, Recorder
from openlora.engine.runner import FinishedStep, batch_order
from openlora.engine.sampler import is_plain, sample_rows
from openlora.engine.step import SampledToken, StepRow
from openlora.engine.step_inputs import StepInputs, by_token, mixed_inputs
from openlora.kernels.attention import plan_attention
from openlora.kernels.native.library import NativeKernels, Step, ask_for_huge_pages
from openlora.models.decoder import Decoder

logger = logging.getLogger(__name__)


RECORDED_CHUNK_TOKENS = 64
"""Tokens of prefill chunks in a recorded step, beside as many decodes as there may be. A row reads
its whole context by itself, so a large chunk is better left to torch."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A step of up to ``max_tokens`` tokens, of which up to ``max_num_seqs`` are sampled.

    Attributes:
        ops: the decoder up to ``hidden``, then, from ``head`` on, the head over the first rows of
            ``hidden``; the last one is the greedy draw.
    """

    max_tokens: int
    ops: Any
    head: int
    hidden: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    recorder: Recorder


class NativeRunner:
    """Runs steps of ``model`` on CPU; see ``Runner``.

    Args:
        model: with linears of ``kernels``.
        pages: LoRA pages that the rows' LoRA sets index.
        kv_cache: blocks that the rows' block tables index.
        kernels: the compiled kernels.
        max_num_seqs: most rows of a step.
    """

    def __init__(
        self,
        model: Decoder,
        pages: PageTensors,
        kv_cache: KVCache,
        kernels: NativeKernels,
        max_num_seqs: int,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._kv_cache = kv_cache
        self._parts = NativeParts(
            config=model.config,
            kernels=kernels,
            kv_layers=kv_cache.layers,
            sites=pages.sites,
            block_slices=[torch.tensor(site.shape.block_slices) for site in pages.sites],
        )
        for tensor in (kv_cache.tensor, *(t for site in pages.sites for t in (site.a, site.b))):
            ask_for_huge_pages(tensor)
        self._binder = StepBinder(model, self._parts)
        self._recorded = self._record(max_num_seqs)

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow]) -> FinishedStep:
        """Compute KV and logits of every row's tokens, sample where asked; see ``Runner``."""
        order = batch_order(rows)
        ordered = [rows[index] for index in order]
        num_decodes = sum(len(row.token_ids) == 1 for row in ordered)
        inputs = mixed_inputs(ordered, {}, self._kv_cache.block_size)
        is_small = len(inputs.token_ids) <= self._recorded.max_tokens and not any(
            row.lora_set.extras for row in rows
        )
        run = self._run_recorded if is_small else self._run_mixed
        tokens: list[SampledToken | None] = [None] * len(rows)
        sampled = [index for index in order if rows[index].sampling is not None]
        for index, token in zip(sampled, run(ordered, inputs, num_decodes), strict=True):
            tokens[index] = token
        return FinishedStep(tuple(tokens))

    def _run_recorded(
        self, rows: Sequence[StepRow], inputs: StepInputs, num_decodes: int
    ) -> list[SampledToken]:
        if num_decodes < len(rows):
            inputs = by_token(inputs)
        bound = self._binder.bind(rows, inputs, len(inputs.token_ids))
        recorded, end = self._recorded, len(self._recorded.ops)
        sampling = [s for row in rows if (s := row.sampling) is not None]
        count = len(sampling)
        is_greedy = all(is_plain(s.params) for s in sampling)
        head_end = end if is_greedy else end - 1
        if count == len(inputs.token_ids):
            self._kernels.run_all(recorded.ops, bound.step, 0, head_end)
        else:
            self._kernels.run_all(recorded.ops, bound.step, 0, recorded.head)
            if not count:
                return []
            sampled = torch.from_numpy(inputs.sampled)
            recorded.hidden[:count] = recorded.hidden.index_select(0, sampled)
            self._kernels.run_all(recorded.ops, Step(rows=count), recorded.head, head_end)
        if is_greedy:
            return [SampledToken(token) for token in recorded.tokens[:count].tolist()]
        return sample_rows(recorded.logits[:count], sampling)

    def _run_mixed(
        self, rows: Sequence[StepRow], inputs: StepInputs, num_decodes: int
    ) -> list[SampledToken]:
        bound = self._binder.bind(rows, inputs, num_decodes)
        chunks = self._chunks(rows[num_decodes:], num_decodes)
        token_ids = torch.from_numpy(inputs.token_ids)
        extras = [(len(row.token_ids), row.lora_set.extras) for row in rows]
        ops = NativeOps(self._parts, bound.step, chunks)
        hidden = self._model.forward(token_ids, with_extras(ops, self._model, extras))
        if not len(inputs.sampled):
            return []
        hidden = hidden.index_select(0, torch.from_numpy(inputs.sampled))
        heads = [(1, row.lora_set.extras) for row in rows if row.sampling is not None]
        ops = NativeOps(self._parts, Step(rows=len(hidden)))
        logits = self._model.logits(hidden, with_extras(ops, self._model, heads))
        return sample_rows(logits, [s for row in rows if (s := row.sampling) is not None])

    def _chunks(self, rows: Sequence[StepRow], num_decodes: int) -> Chunks | None:
        if not rows:
            return None

        def plan(window: int) -> Any:
            return plan_attention(
                [len(row.token_ids) for row in rows],
                [row.start + len(row.token_ids) for row in rows],
                [row.block_table for row in rows],
                self._kv_cache.layers[0],
                window,
            )

        full, window = plan(0), self._model.config.sliding_window
        return Chunks(num_decodes, full, plan(window) if window else full)

    @torch.inference_mode()
    def _record(self, max_num_seqs: int) -> _Recorded:
        """Record a step of as many tokens as there may be; with fewer it leaves the rest alone."""
        max_tokens = max_num_seqs + RECORDED_CHUNK_TOKENS
        recorder = Recorder()
        ops = NativeOps(self._parts, Step(rows=max_tokens), recorder=recorder)
        with _NothingElse():  # type: ignore[no-untyped-call]
            hidden = self._model.forward(torch.zeros(max_tokens, dtype=torch.int64), ops)
            head = len(recorder)
            logits = self._model.logits(hidden[:max_num_seqs], ops)
            tokens = ops.greedy(logits)
        return _Recorded(max_tokens, recorder.recorded(), head, hidden, logits, tokens, recorder)


_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::zeros", "aten::slice")


class _NothingElse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Recording sees what goes through the operations; anything else would be lost unseen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        assert name in _ALLOCATIONS, f"{name} of the decoder is none of its operations"
        return func(*args, **(kwargs or {}))
