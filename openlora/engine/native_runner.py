"""One forward pass by the native CPU kernels.

A step of decodes alone is a list of operations recorded once, which one call runs: between its
kernels no Python runs and no thread sleeps. Any other step runs the same decoder operation by
operation, and torch attends for the prefill chunks.
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
from openlora.engine.step_inputs import StepInputs, mixed_inputs
from openlora.kernels.attention import plan_attention
from openlora.kernels.native.library import NativeKernels, Step, ask_for_huge_pages
from openlora.models.decoder import Decoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Decode:
    """A recorded step of up to ``max_rows`` decodes, the last operation being the greedy draw."""

    ops: Any
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
        max_num_seqs: most rows of a step of decodes.
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
        self._decode = self._record(max_num_seqs)

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow]) -> FinishedStep:
        """Compute KV and logits of every row's tokens, sample where asked; see ``Runner``."""
        order = batch_order(rows)
        ordered = [rows[index] for index in order]
        num_decodes = sum(len(row.token_ids) == 1 for row in ordered)
        inputs = mixed_inputs(ordered, {}, self._kv_cache.block_size)
        is_decode = num_decodes == len(rows) == len(inputs.sampled) and not any(
            row.lora_set.extras for row in rows
        )
        run = self._run_decode if is_decode else self._run_mixed
        tokens: list[SampledToken | None] = [None] * len(rows)
        sampled = [index for index in order if rows[index].sampling is not None]
        for index, token in zip(sampled, run(ordered, inputs, num_decodes), strict=True):
            tokens[index] = token
        return FinishedStep(tuple(tokens))

    def _run_decode(
        self, rows: Sequence[StepRow], inputs: StepInputs, num_decodes: int
    ) -> list[SampledToken]:
        bound = self._binder.bind(rows, inputs, num_decodes)
        sampling = [s for row in rows if (s := row.sampling) is not None]
        decode, is_greedy = self._decode, all(is_plain(s.params) for s in sampling)
        self._kernels.run_all(decode.ops, bound.step, skip_last=not is_greedy)
        if is_greedy:
            return [SampledToken(token) for token in decode.tokens[:num_decodes].tolist()]
        return sample_rows(decode.logits[:num_decodes], sampling)

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
    def _record(self, max_rows: int) -> _Decode:
        """Record a decode step of ``max_rows``; with fewer rows it leaves the rest alone."""
        recorder = Recorder()
        ops = NativeOps(self._parts, Step(rows=max_rows), recorder=recorder)
        with _NothingElse():  # type: ignore[no-untyped-call]
            hidden = self._model.forward(torch.zeros(max_rows, dtype=torch.int64), ops)
            logits = self._model.logits(hidden, ops)
            tokens = ops.greedy(logits)
        return _Decode(recorder.recorded(), logits, tokens, recorder)


_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::zeros")


class _NothingElse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Recording sees what goes through the operations; anything else would be lost unseen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        assert name in _ALLOCATIONS, f"{name} of the decoder is none of its operations"
        return func(*args, **(kwargs or {}))
