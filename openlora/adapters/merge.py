"""The merges of PEFT's ``add_weighted_adapter``, on the A and B of one linear, in fp32 on CPU.

Methods without "_svd" merge the As and the Bs, each for themselves (with their cross terms);
those with it, and "svd", merge the updates BA and take the best approximation of a given rank.
Papers: task arithmetic (arXiv 2212.04089), TIES (2306.01708), DARE (2311.03099).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from openlora.adapters.merge_spec import MergeSpec

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's update of a linear, ``weight · scale · b @ a``: a [r, in], b [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight: float


class Merger:
    """Merges the linears of some adapters, in the order of the model's modules.

    The order matters where a method is random: all draws come from one generator, as in PEFT.

    Args:
        spec: the method and its settings; not "cat".
        rank: of the results of the methods that approximate.
    """

    def __init__(self, spec: MergeSpec, rank: int) -> None:
        self._spec = spec
        self._rank = rank
        self._generator = torch.Generator().manual_seed(spec.seed)

    def merge(self, parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
        """a [rank, in] and b [out, rank] of the merged linear, at scale 1. fp32.

        Without "_svd" all parts have one rank, which is the result's as well.
        """
        method = self._spec.method
        if method == "svd":
            return self._low_rank(parts)
        if method.endswith("_svd"):
            deltas = [(part.b @ part.a) * part.scale for part in parts]
            weights = torch.tensor([part.weight for part in parts])
            return _truncated(self._combine(deltas, weights), self._rank)
        # A weight's sign goes to one side alone: on both it would cancel.
        scaled = [part.weight * part.scale for part in parts]
        roots = torch.tensor([math.sqrt(abs(value)) for value in scaled])
        signs = torch.tensor([1.0 if value >= 0 else -1.0 for value in scaled])
        a = self._combine([part.a for part in parts], roots * signs)
        return a, self._combine([part.b for part in parts], roots)

    def _low_rank(self, parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
        """The best approximation of Σ w·ΔW, from its factors where they are thin."""
        a = torch.cat([part.a for part in parts])
        b = torch.cat([part.b * (part.weight * part.scale) for part in parts], dim=1)
        if a.shape[0] >= min(a.shape[1], b.shape[0]):
            return _truncated(b @ a, self._rank)
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        inner_a, inner_b = _truncated(r_b @ r_a.T, self._rank)
        return inner_a @ q_a.T, q_b @ inner_b

    def _combine(self, tensors: Tensors, weights: torch.Tensor) -> torch.Tensor:
        """Σ weight · tensor, pruned and sign-elected as the method says."""
        method = self._spec.method
        if "dare" in method:
            tensors = [self._dropped(tensor) for tensor in tensors]
        elif "ties" in method or "prune" in method:
            tensors = [self._pruned(tensor) for tensor in tensors]
        stacked = torch.stack([*tensors])
        weighted = stacked * weights.view(-1, *[1] * (stacked.dim() - 1))
        if "ties" not in method:
            return weighted.sum(dim=0)
        agrees = self._majority(stacked)
        return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)

    def _pruned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest values of ``tensor``, a share of ``density``; zeros for the others."""
        if self._density >= 1:
            return tensor
        kept = tensor.abs().flatten().topk(int(self._density * tensor.numel())).indices
        mask = torch.zeros(tensor.numel())
        mask[kept] = 1
        return tensor * mask.view_as(tensor)

    def _dropped(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each value of ``tensor`` with probability ``density``, scaled up by 1/density."""
        if self._density >= 1:
            return tensor
        probabilities = torch.full_like(tensor, self._density)
        return tensor * torch.bernoulli(probabilities, generator=self._generator) / self._density

    def _majority(self, stacked: torch.Tensor) -> torch.Tensor:
        """Where a value has the sign that the unweighted values together have; [n, …] bool."""
        signs = stacked.sign()
        votes = stacked if self._spec.majority_sign == "total" else signs
        return signs == torch.where(votes.sum(dim=0) >= 0, 1, -1)

    @property
    def _density(self) -> float:
        assert self._spec.density is not None
        return self._spec.density


def _truncated(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b of the best approximation of ``delta`` [out, in] whose rank is at most ``rank``."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]
