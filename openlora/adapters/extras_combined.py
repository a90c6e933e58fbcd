"""The weighted sum of adapters' extras, where there is an exact one.

What is added to an output adds up: trained biases, and the low-rank pairs of embeddings and head.
What takes the place of a weight (DoRA's magnitudes, norms, whole embeddings) does not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from openlora.adapters.extras import AdapterExtras, LinearExtra, TableExtra

Part = tuple[AdapterExtras, float]
MAX_COMBINED = 8
"""Sums that are kept for further requests with the same adapters and weights."""


class CombinedExtras:
    """Sums by name: one object for all requests with the same parts."""

    def __init__(self) -> None:
        self._sums: OrderedDict[str, AdapterExtras] = OrderedDict()

    def of(self, name: str, parts: Sequence[Part]) -> AdapterExtras | None:
        """``combined_extras`` of ``parts``, which ``name`` names by content."""
        if len(parts) < 2 and all(weight == 1.0 for _, weight in parts):
            return parts[0][0] if parts else None
        if name not in self._sums:
            total = combined_extras(parts)
            assert total is not None
            self._sums[name] = total
            if len(self._sums) > MAX_COMBINED:
                self._sums.popitem(last=False)
        self._sums.move_to_end(name)
        return self._sums[name]


def combined_extras(parts: Sequence[Part]) -> AdapterExtras | None:
    """Σ weight · extras; None of none. ``AdapterExtras.inexact`` of each is "" unless it is alone
    with weight 1."""
    if not parts:
        return None
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    sites = sorted({site for extras, _ in parts for site in extras.linears})
    return AdapterExtras(
        linears={site: LinearExtra(None, _bias(parts, site)) for site in sites},
        embedding=_table([(extras.embedding, weight) for extras, weight in parts]),
        head=_table([(extras.head, weight) for extras, weight in parts]),
    )


def _bias(parts: Sequence[Part], site: tuple[int, int]) -> torch.Tensor:
    found = [
        (extras.linears[site].bias, weight) for extras, weight in parts if site in extras.linears
    ]
    biases = [bias.float() * weight for bias, weight in found if bias is not None]
    total = torch.stack(biases).sum(0)
    return total.to(next(bias for bias, _ in found if bias is not None).dtype)


def _table(tables: Sequence[tuple[TableExtra | None, float]]) -> TableExtra | None:
    """The pairs side by side, each weight in its b."""
    pairs = [
        (table.a, table.b * weight)
        for table, weight in tables
        if table is not None and table.a is not None and table.b is not None
    ]
    if not pairs:
        return None
    return TableExtra(
        a=torch.cat([a for a, _ in pairs], dim=1).contiguous(),
        b=torch.cat([b for _, b in pairs], dim=0).contiguous(),
    )
