"""An adapter's extras as tensors: what its rows compute otherwise than by LoRA pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class LinearExtra:
    """Of one fused linear of a layer.

    Attributes:
        gain: [out] or None: what the base's output, its bias not counted, is multiplied with, less
            1 (DoRA; the adapter's pages have it already).
        bias: [out] or None: what is added.
    """

    gain: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class TableExtra:
    """Of the embedding, or of the head.

    Attributes:
        weight: [vocab, hidden] or None: it takes the place of the base's.
        a, b: [vocab, rank] and [rank, hidden] of the embedding, [hidden, rank] and [rank, vocab]
            of the head, scale in b; or None. vocab includes added tokens.
        added: [tokens, hidden] or None: rows of tokens behind the base's vocabulary.
    """

    weight: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    added: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AdapterExtras:
    """What an adapter changes beside its pages, on the model's device and in its dtype.

    Attributes:
        linears: by (layer, site).
        norms: weights by their names in the checkpoint, the family's offset added.
        embedding, head: None: as the base's.
    """

    linears: Mapping[tuple[int, int], LinearExtra] = field(default_factory=dict)
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    embedding: TableExtra | None = None
    head: TableExtra | None = None

    @property
    def size_bytes(self) -> int:
        """Memory of all tensors."""
        tensors: list[torch.Tensor | None] = [*self.norms.values()]
        for linear in self.linears.values():
            tensors += [linear.gain, linear.bias]
        for table in (self.embedding, self.head):
            if table is not None:
                tensors += [table.weight, table.a, table.b, table.added]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def num_added(self) -> int:
        """Tokens behind the base's vocabulary."""
        table = self.embedding
        return 0 if table is None or table.added is None else table.added.shape[0]

    @property
    def inexact(self) -> str:
        """What of it cannot be weighted or added to another's, in words; "": all can."""
        found = []
        if any(linear.gain is not None for linear in self.linears.values()):
            found.append("DoRA")
        if self.norms:
            found.append("whole norms")
        for table, name in ((self.embedding, "embed_tokens"), (self.head, "lm_head")):
            if table is not None and table.weight is not None:
                found.append(f"a whole {name}")
        if self.num_added:
            found.append("added vocabulary")
        return " and ".join(found)
