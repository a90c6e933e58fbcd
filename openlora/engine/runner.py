"""One forward pass over any mix of prefill, decode and adapters, in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openlora.adapters.lora_set import SITES, LoRASet
from openlora.adapters.page_tensors import PageTensors
from openlora.engine.extra_ops import with_extras
from openlora.engine.kv_cache import KVCache
from openlora.engine.sampler import sample_rows
from openlora.engine.step import SampledToken, StepRow
from openlora.kernels.attention import AttentionPlan, plan_attention
from openlora.kernels.kv_write import slot_rows_for
from openlora.kernels.rope import rope_cos_sin
from openlora.kernels.sgmv import LoRAPlan, Segment, plan_lora
from openlora.models.decoder import Decoder
from openlora.models.ops import AttentionInputs, TorchOps


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step whose tokens are there already: torch on CPU computes within ``launch``."""

    tokens: tuple[SampledToken | None, ...]

    def wait(self) -> list[SampledToken | None]:
        """The sampled tokens, one entry per row; None for rows without sampling."""
        return list(self.tokens)

    def is_done(self) -> bool:
        """It is."""
        return True


class ModelRunner:
    """Runs steps of ``model`` on its device.

    Args:
        model: the base model.
        pages: LoRA pages that the rows' LoRA sets index.
        kv_cache: blocks that the rows' block tables index.
    """

    def __init__(self, model: Decoder, pages: PageTensors, kv_cache: KVCache) -> None:
        self._model = model
        self._pages = pages
        self._kv_cache = kv_cache
        # While the same requests decode, their LoRA plan stays the same from step to step.
        self._lora_key: tuple[tuple[LoRASet, int], ...] = ()
        self._lora_plans: tuple[LoRAPlan | None, ...] = (None,) * len(SITES)

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow]) -> FinishedStep:
        """Compute KV and logits of every row's tokens, sample where asked; see ``Runner``."""
        order = batch_order(rows)
        ordered = [rows[index] for index in order]
        ops = self._bind(ordered)
        token_ids = self._tensor([token for row in ordered for token in row.token_ids])
        extras = [(len(row.token_ids), row.lora_set.extras) for row in ordered]
        hidden = self._model.forward(token_ids, with_extras(ops, self._model, extras))
        ends = torch.tensor([len(row.token_ids) for row in ordered]).cumsum(0).tolist()
        sampled = [place for place, row in enumerate(ordered) if row.sampling is not None]
        tokens: list[SampledToken | None] = [None] * len(rows)
        if sampled:
            last = self._tensor([ends[place] - 1 for place in sampled])
            heads = with_extras(ops, self._model, [(1, extras[place][1]) for place in sampled])
            logits = self._model.logits(hidden.index_select(0, last), heads)
            sampling = [s for row in ordered if (s := row.sampling) is not None]
            for place, token in zip(sampled, sample_rows(logits, sampling), strict=True):
                tokens[order[place]] = token
        return FinishedStep(tuple(tokens))

    def _bind(self, rows: Sequence[StepRow]) -> TorchOps:
        """The step's operations: everything that all layers share is computed here, once."""
        config = self._model.config
        kv_shape = self._kv_cache.layers[0].shape
        positions = self._tensor(
            [row.start + offset for row in rows for offset in range(len(row.token_ids))]
        )
        size = self._kv_cache.block_size
        blocks = self._tensor(
            [
                row.block_table[position // size]
                for row in rows
                for position in range(row.start, row.start + len(row.token_ids))
            ]
        )
        full, sliding = self._attention_inputs(rows, positions)
        return TorchOps(
            config=config,
            slot_rows=slot_rows_for(blocks, positions % size, kv_shape),
            full=full,
            sliding=sliding,
            kv_layers=self._kv_cache.layers,
            lora_plans=self._plan_lora(rows),
            lora_pages=[site.layers for site in self._pages.sites],
        )

    def _attention_inputs(
        self, rows: Sequence[StepRow], positions: torch.Tensor
    ) -> tuple[AttentionInputs, AttentionInputs]:
        """For layers without and with a window; the same where these do not differ."""
        model, window = self._model, self._model.config.sliding_window

        def plan(window: int) -> AttentionPlan:
            return plan_attention(
                [len(row.token_ids) for row in rows],
                [row.start + len(row.token_ids) for row in rows],
                [row.block_table for row in rows],
                self._kv_cache.layers[0],
                window,
            )

        scaling = model.config.rope_scaling
        factor = 1.0 if scaling is None else scaling.attention_factor
        cos, sin = rope_cos_sin(positions, model.rope_inv_freq, model.dtype, factor)
        full = AttentionInputs(cos, sin, plan(0))
        if model.local_rope_inv_freq is not None:
            cos, sin = rope_cos_sin(positions, model.local_rope_inv_freq, model.dtype)
        return full, AttentionInputs(cos, sin, plan(window) if window else full.plan)

    def _plan_lora(self, rows: Sequence[StepRow]) -> tuple[LoRAPlan | None, ...]:
        key = tuple((row.lora_set, len(row.token_ids)) for row in rows)
        if key != self._lora_key:
            self._lora_key = key
            self._lora_plans = tuple(
                plan_lora(
                    _segments(rows, index), *site.layers[0], block_slices=site.shape.block_slices
                )
                for index, site in enumerate(self._pages.sites)
            )
        return self._lora_plans

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)


def batch_order(rows: Sequence[StepRow]) -> list[int]:
    """Indices of ``rows`` in the order in which a step lays them out.

    Decodes first; within them and within the prefills, equal LoRA sets together, base last.
    """
    return sorted(range(len(rows)), key=lambda index: _sort_key(rows[index]))


def _sort_key(row: StepRow) -> tuple[bool, bool, tuple[tuple[tuple[int, float], ...], ...]]:
    return (len(row.token_ids) != 1, row.lora_set.is_empty, row.lora_set.pages)


def _segments(rows: Sequence[StepRow], site: int) -> list[Segment]:
    """Adjacent rows with the same pages at ``site``; rows with none are in no segment."""
    segments: list[Segment] = []
    start = 0
    for row in rows:
        end = start + len(row.token_ids)
        pages = row.lora_set.pages[site]
        if pages and segments and segments[-1].end == start and segments[-1].pages == pages:
            segments[-1] = Segment(segments[-1].start, end, pages)
        elif pages:
            segments.append(Segment(start, end, pages))
        start = end
    return segments
