"""Copies of extras: made once, all of them, and dropped in the order of their last use."""

from __future__ import annotations

import torch

from openlora.adapters.extras import AdapterExtras, LinearExtra, TableExtra
from openlora.engine.device_extras import DeviceExtras, moved

META = torch.device("meta")


def extras(size: int = 4) -> AdapterExtras:
    table = TableExtra(torch.ones(size), torch.ones(size), torch.ones(size), torch.ones(size))
    return AdapterExtras(
        linears={(0, 1): LinearExtra(torch.ones(size), torch.ones(size))},
        norms={"model.norm": torch.ones(size)},
        embedding=table,
        head=table,
    )


def test_every_tensor_is_moved():
    copy = moved(extras(), META)
    tensors = [copy.norms["model.norm"]]
    for part in (copy.linears[0, 1], copy.embedding, copy.head):
        tensors += [getattr(part, name) for name in part.__slots__]
    assert len(tensors) == 11
    assert {tensor.device for tensor in tensors} == {META}
    assert copy.size_bytes == extras().size_bytes
    assert moved(AdapterExtras(), META).size_bytes == 0


def test_copied_once_and_dropped_when_others_were_used_since():
    first, second, third = extras(), extras(), extras()
    kept = DeviceExtras(META, 2 * first.size_bytes)
    assert kept.of(None) is None
    copies = [kept.of(first), kept.of(second)]
    assert kept.of(first) is copies[0]
    kept.of(third)
    assert kept.of(first) is copies[0]
    assert kept.of(second) is not copies[1]


def test_one_that_is_larger_than_all_room_is_kept_alone():
    kept = DeviceExtras(META, 1)
    large = extras(100)
    copy = kept.of(large)
    assert kept.of(large) is copy
