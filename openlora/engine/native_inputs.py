"""A step's rows as the native kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openlora.adapters.lora_set import SITES, LoRASet
from openlora.engine.native_ops import NativeParts
from openlora.engine.step import StepRow
from openlora.engine.step_inputs import StepInputs
from openlora.kernels.native.library import Site, Step
from openlora.kernels.native.plan import Run, SitePlan, plan_site
from openlora.models.decoder import Decoder


class LoRAPlanner:
    """The LoRA plans of a step, kept while the same requests decode."""

    def __init__(self, parts: NativeParts) -> None:
        self._widths = [site.a.shape[3] for site in parts.sites]
        self._key: list[tuple[LoRASet, int]] = []
        self._plans: list[SitePlan | None] = [None] * len(SITES)

    def plan(self, rows: Sequence[StepRow]) -> list[SitePlan | None]:
        """Per site its plan; None where no row has pages."""
        key = [(row.lora_set, len(row.token_ids)) for row in rows]
        if key != self._key:
            self._plans = [
                plan_site(_runs(rows, site), width) for site, width in enumerate(self._widths)
            ]
            self._key = key
        return self._plans


def _runs(rows: Sequence[StepRow], site: int) -> list[Run]:
    """All tokens as runs of equal pages."""
    runs: list[Run] = []
    start = 0
    for row in rows:
        end, pages = start + len(row.token_ids), row.lora_set.pages[site]
        if runs and runs[-1][2] == pages:
            runs[-1] = (runs[-1][0], end, pages)
        else:
            runs.append((start, end, pages))
        start = end
    return runs


@dataclass(frozen=True, slots=True)
class BoundStep:
    """A step, and what it points into."""

    step: Step
    tensors: tuple[object, ...]


class StepBinder:
    """Makes steps of one model.

    Args:
        model: whose rotary embedding it is.
        parts: whose LoRA pages the rows name.
    """

    def __init__(self, model: Decoder, parts: NativeParts) -> None:
        self._planner = LoRAPlanner(parts)
        scaling = model.config.rope_scaling
        self._factor = 1.0 if scaling is None else scaling.attention_factor
        self._inv_freq = model.rope_inv_freq
        self._local_inv_freq = model.local_rope_inv_freq

    def bind(self, rows: Sequence[StepRow], inputs: StepInputs, num_decodes: int) -> BoundStep:
        """The step of ``rows``, decodes first.

        Args:
            inputs: of the same rows.
            num_decodes: how many of the rows, the first ones, have one token.
        """
        plans = self._planner.plan(rows)
        positions = torch.from_numpy(inputs.positions)[:, None]
        cos, sin = _cos_sin(positions, self._inv_freq, self._factor)
        local = (cos, sin)
        if self._local_inv_freq is not None:
            local = _cos_sin(positions, self._local_inv_freq, 1.0)
        tables = np.ascontiguousarray(inputs.block_tables)
        step = Step(
            rows=len(inputs.token_ids),
            decode_rows=num_decodes,
            token_ids=inputs.token_ids.ctypes.data,
            slots=inputs.slots.ctypes.data,
            context_lens=inputs.context_lens.ctypes.data,
            block_tables=tables.ctypes.data,
            table_width=tables.shape[1],
        )
        step.cos[:] = (cos.data_ptr(), local[0].data_ptr())
        step.sin[:] = (sin.data_ptr(), local[1].data_ptr())
        for site, plan in enumerate(plans):
            step.sites[site] = Site() if plan is None else plan.site
        return BoundStep(step, (inputs, tables, cos, sin, local, plans))


def _cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two fp32 [tokens, rotary_dim / 2]."""
    angles = positions * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos.mul_(factor), sin.mul_(factor))
