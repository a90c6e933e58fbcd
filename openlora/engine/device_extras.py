"""Extras of adapters on a GPU: copied there by the first step that has them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch

from openlora.adapters.extras import AdapterExtras, TableExtra


class DeviceExtras:
    """Copies of ``AdapterExtras``, least recently used ones go first. One thread's.

    A step under way keeps what it reads: its memory is given to nobody before the step has run,
    for copies are made and freed on the stream of the steps.

    Args:
        device: of the copies; those that are there already are not copied.
        max_bytes: of all copies, but for those of one step.
    """

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._bytes = 0
        # By the extras themselves: two of equal content are told apart.
        self._copies: OrderedDict[AdapterExtras, AdapterExtras] = OrderedDict()

    def of(self, extras: AdapterExtras | None) -> AdapterExtras | None:
        """``extras`` on the device."""
        if extras is None:
            return None
        copy = self._copies.get(extras)
        if copy is None:
            copy = self._copies[extras] = moved(extras, self._device)
            self._bytes += copy.size_bytes
            while self._bytes > self._max_bytes and len(self._copies) > 1:
                self._bytes -= self._copies.popitem(last=False)[1].size_bytes
        self._copies.move_to_end(extras)
        return copy


def moved(extras: AdapterExtras, device: torch.device) -> AdapterExtras:
    """A copy with all tensors on ``device``."""

    def to(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    def table(of: TableExtra | None) -> TableExtra | None:
        if of is None:
            return None
        return TableExtra(to(of.weight), to(of.a), to(of.b), to(of.added))

    return replace(
        extras,
        linears={
            place: replace(linear, gain=to(linear.gain), bias=to(linear.bias))
            for place, linear in extras.linears.items()
        },
        norms={name: norm.to(device) for name, norm in extras.norms.items()},
        embedding=table(extras.embedding),
        head=table(extras.head),
    )
